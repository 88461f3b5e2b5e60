# The s3:// store, part of sp_durable. Without SP_S3 all that is left of it is its URL and an error.
target_sources(sp_durable PRIVATE s3_options.cc)
if(NOT SP_S3)
  target_sources(sp_durable PRIVATE s3_disabled.cc)
  return()
endif()
find_package(pugixml REQUIRED)
target_sources(sp_durable PRIVATE s3_calls.cc s3_checksums.cc s3_client.cc s3_errors.cc s3_library.cc s3_store.cc s3_upload.cc s3_xml.cc)
target_link_libraries(sp_durable PRIVATE sp_aws_c_s3 pugixml::static)

if(SP_BUILD_TESTS)
  find_package(Boost 1.81 CONFIG REQUIRED)  # The server of the tests.
  foreach(test s3_gateway_test s3_parts_test s3_server_lies_test)
    add_executable(${test} ${test}.cc)
    target_link_libraries(${test} PRIVATE sp_durable sp_os sp_aws_c_s3 GTest::gtest GTest::gtest_main)
    target_compile_definitions(${test} PRIVATE SP_SOURCE_DIR="${PROJECT_SOURCE_DIR}")
    sp_register_test(${test})
  endforeach()
  target_sources(s3_server_lies_test PRIVATE s3_fake_server.cc)
  target_link_libraries(s3_server_lies_test PRIVATE Boost::headers)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND SP_SANITIZE MATCHES "thread")
    set_source_files_properties(s3_fake_server.cc s3_server_lies_test.cc PROPERTIES COMPILE_OPTIONS -Wno-tsan)  # As in src/http.
  endif()
endif()
