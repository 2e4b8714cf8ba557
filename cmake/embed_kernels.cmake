# Writes kernels/** into one C++ file, as octomoe::jit::embedded_kernels().
# Included by CMakeLists.txt it declares how and when; as a script it does it:
#   cmake -DROOT=kernels -DOUT=embedded_kernels.cpp -P cmake/embed_kernels.cmake

if(NOT CMAKE_SCRIPT_MODE_FILE)
  set(OCTOMOE_EMBEDDED_KERNELS ${CMAKE_CURRENT_BINARY_DIR}/embedded_kernels.cpp)
  file(GLOB_RECURSE OCTOMOE_KERNEL_FILES CONFIGURE_DEPENDS
    ${CMAKE_CURRENT_SOURCE_DIR}/kernels/*.cuh ${CMAKE_CURRENT_SOURCE_DIR}/kernels/*.h)
  # The list itself is an input too: a removed file must vanish from the library.
  list(JOIN OCTOMOE_KERNEL_FILES "\n" octomoe_kernel_list)
  file(CONFIGURE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/embedded_kernels.txt CONTENT "${octomoe_kernel_list}\n" @ONLY)
  add_custom_command(OUTPUT ${OCTOMOE_EMBEDDED_KERNELS}
    COMMAND ${CMAKE_COMMAND} -DROOT=${CMAKE_CURRENT_SOURCE_DIR}/kernels -DOUT=${OCTOMOE_EMBEDDED_KERNELS}
      -P ${CMAKE_CURRENT_LIST_FILE}
    DEPENDS ${OCTOMOE_KERNEL_FILES} ${CMAKE_CURRENT_BINARY_DIR}/embedded_kernels.txt ${CMAKE_CURRENT_LIST_FILE}
    COMMENT "Embedding kernels/" VERBATIM)
  return()
endif()

file(GLOB_RECURSE files RELATIVE ${ROOT} ${ROOT}/*.cuh ${ROOT}/*.h)
list(SORT files)
set(text "// Written by cmake/embed_kernels.cmake.\n#include \"jit/sources.h\"\n\nnamespace octomoe::jit {\nnamespace {\n\n")
string(APPEND text "const Source kSources[] = {\n")
foreach(file ${files})
  file(READ ${ROOT}/${file} content)
  # CMake's own text handling keeps every character but NUL; a raw string keeps every character but its own end.
  string(FIND "${content}" ")octomoe_source\"" clash)
  if(NOT clash EQUAL -1)
    message(FATAL_ERROR "${file} holds the end mark of its own embedding")
  endif()
  string(APPEND text "{\"${file}\", R\"octomoe_source(${content})octomoe_source\"},\n")
endforeach()
if(NOT files)
  string(APPEND text "{\"\", \"\"}\n")
endif()
string(APPEND text "};\n\n}  // namespace\n\n")
string(APPEND text "std::span<const Source> embedded_kernels() { return kSources; }\n\n}  // namespace octomoe::jit\n")
file(WRITE ${OUT} "${text}")
