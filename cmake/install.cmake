# liboctomoe.so and what its users need: headers, the CMake package, octomoe.pc, the octomoe command.
#
#   cmake --install build --prefix /opt/octomoe            everything
#   cmake --install build --component runtime              library and command only
#   DESTDIR=/tmp/stage cmake --install build               for packagers
# The installed tree can be moved: nothing in it holds an absolute path.

add_library(octomoe SHARED $<TARGET_OBJECTS:octomoe_core>)
add_library(octomoe::octomoe ALIAS octomoe)
target_compile_features(octomoe INTERFACE cxx_std_20)
target_include_directories(octomoe INTERFACE
  $<BUILD_INTERFACE:${CMAKE_CURRENT_SOURCE_DIR}/include>
  $<BUILD_INTERFACE:${CMAKE_CURRENT_BINARY_DIR}/include>
  $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
target_link_libraries(octomoe PRIVATE octomoe_flags ${OCTOMOE_PRIVATE_LIBRARIES})
set_target_properties(octomoe PROPERTIES
  LINKER_LANGUAGE CXX
  VERSION ${PROJECT_VERSION}
  # Before 1.0 a minor version may change the ABI.
  SOVERSION ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR}
  LINK_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/cmake/octomoe.map)
target_link_options(octomoe PRIVATE LINKER:--version-script=${CMAKE_CURRENT_SOURCE_DIR}/cmake/octomoe.map)
if(NOT OCTOMOE_SANITIZE)
  target_link_options(octomoe PRIVATE LINKER:--no-undefined)
endif()

if(NOT OCTOMOE_INSTALL)
  return()
endif()

include(CMakePackageConfigHelpers)
set(OCTOMOE_CMAKE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/octomoe)

# Kernels that were the fastest where they were measured (octomoe tune).
install(FILES share/tuned.json DESTINATION ${CMAKE_INSTALL_DATADIR}/octomoe COMPONENT runtime)
install(TARGETS octomoe EXPORT octomoeTargets
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT runtime NAMELINK_COMPONENT development)
if(TARGET octomoe_cli)
  install(TARGETS octomoe_cli RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR} COMPONENT runtime)
  install(PROGRAMS bench/peer_torch.py DESTINATION ${CMAKE_INSTALL_DATADIR}/octomoe COMPONENT runtime)
endif()
install(DIRECTORY include/octomoe DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT development
  FILES_MATCHING PATTERN *.h)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/include/octomoe/version.h
  DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/octomoe COMPONENT development)

install(EXPORT octomoeTargets NAMESPACE octomoe:: DESTINATION ${OCTOMOE_CMAKE_DIR} COMPONENT development)
configure_package_config_file(cmake/octomoeConfig.cmake.in ${CMAKE_CURRENT_BINARY_DIR}/octomoeConfig.cmake
  INSTALL_DESTINATION ${OCTOMOE_CMAKE_DIR})
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/octomoeConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/octomoeConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/octomoeConfigVersion.cmake
  DESTINATION ${OCTOMOE_CMAKE_DIR} COMPONENT development)

file(RELATIVE_PATH OCTOMOE_PC_PREFIX ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig ${CMAKE_INSTALL_PREFIX})
string(REGEX REPLACE "/$" "" OCTOMOE_PC_PREFIX "${OCTOMOE_PC_PREFIX}")
configure_file(cmake/octomoe.pc.in ${CMAKE_CURRENT_BINARY_DIR}/octomoe.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/octomoe.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig COMPONENT development)
install(FILES LICENSE README.md DESTINATION ${CMAKE_INSTALL_DOCDIR} COMPONENT runtime)
