# What `cmake --install` writes: headers, libraries, a CMake package and a pkg-config file that can all be moved together.
# A wheel gets the shared library and the headers, in the folders where `fbiedge library` looks for them.

if(SKBUILD)
  set(CMAKE_INSTALL_LIBDIR lib)
  set(CMAKE_INSTALL_BINDIR lib)  # of a .dll
  set(CMAKE_INSTALL_INCLUDEDIR include)
endif()
include(GNUInstallDirs)

install(TARGETS ${libraries} EXPORT fbiedge_ops-targets
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
  RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
install(FILES include/fbiedge_ops.h include/fbiedge_register.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
if(SKBUILD)
  return()
endif()

# Who links the static library by a C compiler must name the C++ runtime.
set(cxx_libraries ${CMAKE_CXX_IMPLICIT_LINK_LIBRARIES})
list(FILTER cxx_libraries INCLUDE REGEX "^(stdc\\+\\+|c\\+\\+|m)$")
list(REMOVE_DUPLICATES cxx_libraries)

include(CMakePackageConfigHelpers)
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/fbiedge_ops)
configure_package_config_file(cmake/fbiedge_ops-config.cmake.in fbiedge_ops-config.cmake
  INSTALL_DESTINATION ${package_dir} NO_SET_AND_CHECK_MACRO)
write_basic_package_version_file(fbiedge_ops-config-version.cmake COMPATIBILITY ${compatibility})
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/fbiedge_ops-config.cmake
  ${CMAKE_CURRENT_BINARY_DIR}/fbiedge_ops-config-version.cmake DESTINATION ${package_dir})
install(EXPORT fbiedge_ops-targets NAMESPACE fbiedge_ops:: DESTINATION ${package_dir})

list(TRANSFORM cxx_libraries PREPEND -l)
list(JOIN cxx_libraries " " private_libraries)
file(RELATIVE_PATH prefix_of_pc /${CMAKE_INSTALL_LIBDIR}/pkgconfig /)
configure_file(cmake/fbiedge_ops.pc.in fbiedge_ops.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/fbiedge_ops.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
