# bench/NAME_bench.cpp -> octomoe_bench_NAME, with Google Benchmark. oneDNN, where it is installed, is measured beside
# our kernels (OCTOMOE_HAVE_DNNL); the library itself never uses it.

if(NOT OCTOMOE_BUILD_BENCH)
  return()
endif()
find_package(benchmark REQUIRED)
find_package(dnnl QUIET)

file(GLOB OCTOMOE_BENCH_SOURCES CONFIGURE_DEPENDS bench/*_bench.cpp)
foreach(source ${OCTOMOE_BENCH_SOURCES})
  get_filename_component(name ${source} NAME_WE)
  string(REGEX REPLACE "_bench$" "" name ${name})
  add_executable(octomoe_bench_${name} ${source})
  target_link_libraries(octomoe_bench_${name} PRIVATE octomoe_core octomoe_flags octomoe_fmt
    nlohmann_json::nlohmann_json benchmark::benchmark)
  if(TARGET DNNL::dnnl)
    target_compile_definitions(octomoe_bench_${name} PRIVATE OCTOMOE_HAVE_DNNL)
    target_link_libraries(octomoe_bench_${name} PRIVATE DNNL::dnnl)
  endif()
endforeach()
