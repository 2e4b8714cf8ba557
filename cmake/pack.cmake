# `cmake --build build --target pack`: the kernel pack of this build, at share/octomoe/kernels.pack, where the library
# looks for it. Not part of `all`: it needs NVRTC and a minute.

if(NOT TARGET octomoe_cli)
  return()
endif()
set(OCTOMOE_PACK_ARCHS "sm_80,sm_86,sm_89,sm_90a,compute_90" CACHE STRING "Architectures of the pack")
set(OCTOMOE_PACK ${CMAKE_CURRENT_BINARY_DIR}/share/octomoe/kernels.pack)
add_custom_target(pack
  COMMAND ${CMAKE_COMMAND} -E make_directory ${CMAKE_CURRENT_BINARY_DIR}/share/octomoe
  COMMAND octomoe_cli pack --arch ${OCTOMOE_PACK_ARCHS} --out ${OCTOMOE_PACK}
  DEPENDS octomoe_cli USES_TERMINAL VERBATIM)
if(OCTOMOE_INSTALL)
  install(FILES ${OCTOMOE_PACK} DESTINATION ${CMAKE_INSTALL_DATADIR}/octomoe COMPONENT runtime OPTIONAL)
endif()
