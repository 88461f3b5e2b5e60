# sp_register_test(NAME [ARGS ...]): registers the GoogleTest program NAME, also one with a main() of its own, with ctest.
# tools/run_tests.py counts the cases from the file that it writes. An option, not the variable GTEST_OUTPUT: a test that
# starts itself again would pass the variable on and its child would overwrite the file.
function(sp_register_test name)
  add_test(NAME ${name} COMMAND ${name} --gtest_output=json:${PROJECT_BINARY_DIR}/test-results/${name}.json ${ARGN})
  set_tests_properties(${name} PROPERTIES TIMEOUT 300)
endfunction()

# sp_library(NAME [PURE] SOURCES ... DEPS ... TESTS ... [TEST_DEPS ...])
# One static library sp_NAME for src/NAME and, per listed foo_test.cc, one test program registered with ctest. PURE: without threads, so that
# ThreadSanitizer has nothing to see in its tests, and builds none of them.
function(sp_library name)
  cmake_parse_arguments(ARG "PURE" "" "SOURCES;DEPS;TESTS;TEST_DEPS" ${ARGN})
  add_library(sp_${name} STATIC ${ARG_SOURCES})
  target_include_directories(sp_${name} PUBLIC ${PROJECT_SOURCE_DIR}/src)
  target_link_libraries(sp_${name} PUBLIC ${ARG_DEPS})
  if(SP_BUILD_TESTS AND NOT (ARG_PURE AND SP_SANITIZE STREQUAL "thread"))
    foreach(test ${ARG_TESTS})
      get_filename_component(stem ${test} NAME_WE)
      add_executable(${stem} ${test})
      target_link_libraries(${stem} PRIVATE sp_${name} ${ARG_TEST_DEPS} GTest::gtest GTest::gtest_main)
      sp_register_test(${stem})
    endforeach()
  endif()
endfunction()
