# tests/fuzz/NAME_fuzz.cpp defines LLVMFuzzerTestOneInput; tests/fuzz/corpus/NAME/ holds its seeds and past findings.
# With OCTOMOE_BUILD_FUZZERS (clang) each becomes the libFuzzer program fuzz_NAME, and a test replays its corpus.

if(NOT OCTOMOE_BUILD_FUZZERS)
  return()
endif()
if(NOT CMAKE_CXX_COMPILER_ID MATCHES Clang)
  message(FATAL_ERROR "OCTOMOE_BUILD_FUZZERS needs clang: configure with -DCMAKE_CXX_COMPILER=clang++")
endif()

# Coverage counters in everything the fuzzers call. The CPU kernels are not called.
target_compile_options(octomoe_core PRIVATE -fsanitize=fuzzer-no-link)
file(GLOB OCTOMOE_KERNEL_SOURCES src/cpu/*kernel*.cpp src/cpu/ops.cpp src/cpu/finish.cpp)
set_property(SOURCE ${OCTOMOE_KERNEL_SOURCES} APPEND PROPERTY COMPILE_OPTIONS -fno-sanitize=fuzzer-no-link)

enable_testing()
file(GLOB OCTOMOE_FUZZ_SOURCES CONFIGURE_DEPENDS tests/fuzz/*_fuzz.cpp)
foreach(source ${OCTOMOE_FUZZ_SOURCES})
  get_filename_component(name ${source} NAME_WE)
  string(REGEX REPLACE "_fuzz$" "" name ${name})
  add_executable(fuzz_${name} ${source})
  target_include_directories(fuzz_${name} PRIVATE tests)
  target_link_libraries(fuzz_${name} PRIVATE octomoe_core octomoe_flags nlohmann_json::nlohmann_json
    octomoe_fmt)
  target_compile_options(fuzz_${name} PRIVATE -fsanitize=fuzzer)
  target_link_options(fuzz_${name} PRIVATE -fsanitize=fuzzer)
  set(corpus ${CMAKE_CURRENT_SOURCE_DIR}/tests/fuzz/corpus/${name})
  if(IS_DIRECTORY ${corpus})
    add_test(NAME fuzz_corpus.${name} COMMAND fuzz_${name} -runs=0 ${corpus})
    set_tests_properties(fuzz_corpus.${name} PROPERTIES LABELS fuzz)
  endif()
endforeach()
