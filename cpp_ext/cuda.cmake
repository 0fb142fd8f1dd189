# Sets dreammix_cuda (TRUE if nvcc can compile our kernels), dreammix_toolkit ("13.0") and dreammix_architectures.
#
# A compiler that is missing, broken, too old or incompatible with the host's compiler never breaks a build that did not
# ask for it: we try it first, and DREAMMIX_CUDA=AUTO goes on without it and says why.
include(CheckLanguage)
include(CheckSourceCompiles)

# Sets `reason` to why the kernels cannot be compiled here; empty if they can. This is a macro because enable_language
# is not allowed in a function.
macro(dreammix_find_cuda reason)
  set(${reason} "")
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    set(${reason} "no working nvcc was found (CUDACXX, or PATH)")
  else()
    enable_language(CUDA)
    if(NOT CMAKE_CUDA_COMPILER_ID STREQUAL "NVIDIA")
      set(${reason} "${CMAKE_CUDA_COMPILER} is not nvcc")
    elseif(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
      set(${reason} "nvcc is ${CMAKE_CUDA_COMPILER_VERSION}, the kernels need 12.0")
    else()
      dreammix_try_headers(${reason})
    endif()
  endif()
endmacro()

function(dreammix_try_headers reason)
  set(CMAKE_CUDA_STANDARD 17)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  check_source_compiles(CUDA [[
    #include <cooperative_groups.h>
    #include <cuda_fp16.h>
    __global__ void kernel() { cooperative_groups::this_grid().sync(); }
    int main() { cudaLaunchConfig_t config{}; return static_cast<int>(cudaLaunchKernelEx(&config, kernel)); }
  ]] DREAMMIX_CUDA_COMPILES)
  if(NOT DREAMMIX_CUDA_COMPILES)
    set(${reason} "${CMAKE_CUDA_COMPILER} cannot compile a small kernel" PARENT_SCOPE)
  endif()
endfunction()

# Sets `known` to the entries of DREAMMIX_CUDA_ARCHITECTURES that nvcc knows.
function(dreammix_known_architectures known)
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch OUTPUT_VARIABLE listed RESULT_VARIABLE failed)
  set(chosen "")
  foreach(architecture IN LISTS DREAMMIX_CUDA_ARCHITECTURES)
    string(REGEX MATCH "^[0-9]+" number "${architecture}")
    if(failed OR listed MATCHES "compute_${number}[^0-9a-z]")
      list(APPEND chosen ${architecture})
    else()
      message(STATUS "CUDA kernels: nvcc ${CMAKE_CUDA_COMPILER_VERSION} does not know ${architecture}; left out")
    endif()
  endforeach()
  # On skipped and future GPUs the driver compiles the newest PTX.
  if(chosen AND NOT chosen MATCHES "[0-9](-virtual|;|$)")
    string(REGEX MATCH "[0-9]+-real$" last "${chosen}")
    string(REPLACE "-real" "-virtual" last "${last}")
    list(APPEND chosen ${last})
  endif()
  set(${known} "${chosen}" PARENT_SCOPE)
endfunction()

set(dreammix_cuda FALSE)
set(dreammix_architectures "")
set(dreammix_toolkit "")
if(NOT DREAMMIX_CUDA STREQUAL "OFF")
  dreammix_find_cuda(dreammix_reason)
  if(NOT dreammix_reason)
    dreammix_known_architectures(dreammix_architectures)
    if(NOT dreammix_architectures)
      set(dreammix_reason "nvcc knows none of ${DREAMMIX_CUDA_ARCHITECTURES}")
    endif()
  endif()
  if(NOT dreammix_reason)
    set(dreammix_cuda TRUE)
    string(REGEX MATCH "^[0-9]+\\.[0-9]+" dreammix_toolkit "${CMAKE_CUDA_COMPILER_VERSION}")
    message(STATUS "CUDA kernels: nvcc ${dreammix_toolkit}, ${dreammix_architectures}")
  elseif(DREAMMIX_CUDA STREQUAL "AUTO")
    message(STATUS "CUDA kernels: none, ${dreammix_reason}")
  else()
    message(FATAL_ERROR "DREAMMIX_CUDA=${DREAMMIX_CUDA}, but ${dreammix_reason}")
  endif()
endif()
