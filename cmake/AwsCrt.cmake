# The aws-c-* libraries that the s3:// store is made of, as static libraries from the C sources inside the `awscrt` source distribution.
#
# They are built once for all build folders of a checkout, when the first of them is configured, and installed under
# build/awscrt/<first digits of the recipe's hash>: presets with sanitizers or another compiler link the same plain libraries, which are C. A change
# of the version or of the recipe makes a new folder. A lock lets configurations that run at once wait for the one that builds.
#
# TLS uses the OpenSSL that the product links anyway. The library's own aws-lc defines the same symbols, and one program must not hold both.
#
# Variables, all optional:
#   SP_AWSCRT_SDIST  the source distribution, where no package index can be reached (default: downloaded with pip, checked by its hash)
#   SP_AWSCRT_ROOT   folder for the sources and the built libraries (default: build/awscrt of this checkout)

set(SP_AWSCRT_VERSION 0.38.1)
set(SP_AWSCRT_SHA256 0dcebfaa70cf079133cd2352119e3d05e9b8ca1d1621736cfb54c03f3d5fef0f)
set(SP_AWSCRT_SDIST "" CACHE FILEPATH "The file awscrt-${SP_AWSCRT_VERSION}.tar.gz, if it is not to be downloaded")
set(SP_AWSCRT_ROOT ${PROJECT_SOURCE_DIR}/build/awscrt CACHE PATH "Where aws-c-s3 is unpacked, built and installed for all build folders")

function(sp_awscrt_run what)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "aws-c-s3: ${what} failed (${result}):\n${output}\n-DSP_S3=OFF builds without s3://.")
  endif()
endfunction()

# Sets `out` to a file whose hash was compared with the pinned one.
function(sp_awscrt_sdist out)
  set(file ${SP_AWSCRT_SDIST})
  if(NOT file)
    set(file ${SP_AWSCRT_ROOT}/awscrt-${SP_AWSCRT_VERSION}.tar.gz)
    if(NOT EXISTS ${file})
      find_package(Python3 REQUIRED COMPONENTS Interpreter)
      message(STATUS "aws-c-s3: downloading awscrt ${SP_AWSCRT_VERSION}")
      # pip asks an sdist for its metadata, and for that needs newer build tools than ours: build isolation stays on, also within a build of
      # our own wheel that has it off. No wheel of awscrt would do, they hold no C sources.
      sp_awscrt_run("the download (SP_AWSCRT_SDIST names a file instead)" ${CMAKE_COMMAND} -E env --unset=PIP_NO_BUILD_ISOLATION
        ${Python3_EXECUTABLE} -m pip --disable-pip-version-check download --quiet --no-deps --no-binary awscrt --dest ${SP_AWSCRT_ROOT}
        awscrt==${SP_AWSCRT_VERSION})
    endif()
  endif()
  if(NOT EXISTS ${file})
    message(FATAL_ERROR "aws-c-s3: there is no ${file}")
  endif()
  file(SHA256 ${file} got)
  if(NOT got STREQUAL SP_AWSCRT_SHA256)
    message(FATAL_ERROR "aws-c-s3: ${file} has the SHA-256\n  ${got}, not\n  ${SP_AWSCRT_SHA256}\nDelete it to have it downloaded again.")
  endif()
  set(${out} ${file} PARENT_SCOPE)
endfunction()

# Sets `out` to the installed prefix; builds it if it is not there.
function(sp_awscrt_prefix out)
  file(SHA256 ${CMAKE_CURRENT_FUNCTION_LIST_FILE} recipe)
  string(SHA256 key "${recipe} ${CMAKE_SYSTEM_PROCESSOR} ${OPENSSL_VERSION}")
  string(SUBSTRING ${key} 0 12 key)
  set(folder ${SP_AWSCRT_ROOT}/${key})
  set(${out} ${folder}/install PARENT_SCOPE)
  if(EXISTS ${folder}/done)
    return()
  endif()
  file(MAKE_DIRECTORY ${SP_AWSCRT_ROOT})
  file(LOCK ${SP_AWSCRT_ROOT}/lock GUARD FUNCTION TIMEOUT 1800)
  if(EXISTS ${folder}/done)
    return()
  endif()
  string(TIMESTAMP start %s)
  sp_awscrt_sdist(sdist)
  file(REMOVE_RECURSE ${folder})
  file(ARCHIVE_EXTRACT INPUT ${sdist} DESTINATION ${folder}/source PATTERNS "*/crt/*")
  set(options -DCMAKE_BUILD_TYPE=Release -DUSE_OPENSSL=ON -DCMAKE_INSTALL_LIBDIR=lib -DCMAKE_INSTALL_PREFIX=${folder}/install
    -DCMAKE_C_COMPILER=${CMAKE_C_COMPILER} -DCMAKE_CXX_COMPILER=${CMAKE_CXX_COMPILER})
  if(CCACHE)
    list(APPEND options -DCMAKE_C_COMPILER_LAUNCHER=${CCACHE})
  endif()
  if(CMAKE_GENERATOR STREQUAL "Ninja")
    list(APPEND options -DCMAKE_MAKE_PROGRAM=${CMAKE_MAKE_PROGRAM})
  endif()
  message(STATUS "aws-c-s3: building it into ${folder}, once for all build folders (one to three minutes)")
  sp_awscrt_run("configuring" ${CMAKE_COMMAND} -S ${folder}/source/awscrt-${SP_AWSCRT_VERSION}/crt -B ${folder}/build -G ${CMAKE_GENERATOR} ${options})
  # Two jobs, as everywhere here; CMAKE_BUILD_PARALLEL_LEVEL of the caller comes first.
  if(DEFINED ENV{CMAKE_BUILD_PARALLEL_LEVEL})
    set(jobs $ENV{CMAKE_BUILD_PARALLEL_LEVEL})
  else()
    set(jobs 2)
  endif()
  sp_awscrt_run("the build" ${CMAKE_COMMAND} --build ${folder}/build --target install --parallel ${jobs})
  file(REMOVE_RECURSE ${folder}/build ${folder}/source)
  file(TOUCH ${folder}/done)
  string(TIMESTAMP end %s)
  math(EXPR seconds "${end} - ${start}")
  message(STATUS "aws-c-s3: built in ${seconds} s")
endfunction()

sp_awscrt_prefix(SP_AWSCRT_PREFIX)
if(NOT TARGET AWS::crypto)
  # What s2n was linked with, so that its own search cannot come back with the static library beside our shared one.
  add_library(AWS::crypto INTERFACE IMPORTED)
  set_target_properties(AWS::crypto PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${OPENSSL_INCLUDE_DIR}" INTERFACE_LINK_LIBRARIES OpenSSL::Crypto)
endif()
list(PREPEND CMAKE_PREFIX_PATH ${SP_AWSCRT_PREFIX})
find_package(aws-c-s3 CONFIG REQUIRED PATHS ${SP_AWSCRT_PREFIX} NO_DEFAULT_PATH)
# Dependants see the targets through names of ours, and the headers as system headers.
add_library(sp_aws INTERFACE)  # HTTP, TLS, signatures, credentials: what s3:// is made of (docs/decisions/013).
target_link_libraries(sp_aws INTERFACE AWS::aws-c-auth AWS::aws-c-http)
add_library(sp_aws_c_s3 INTERFACE)  # For the benchmark, whose yardstick it is.
target_link_libraries(sp_aws_c_s3 INTERFACE AWS::aws-c-s3)
