// What this extension was built from and for. The macros come from CMake.
#pragma once

#include <string>
#include <vector>

#include "../common.hpp"

#if !defined(DREAMMIX_VERSION)
#define DREAMMIX_VERSION ""
#endif
#if !defined(DREAMMIX_CUDA_TOOLKIT)
#define DREAMMIX_CUDA_TOOLKIT ""
#endif
#if !defined(DREAMMIX_CUDA_ARCHITECTURES)
#define DREAMMIX_CUDA_ARCHITECTURES ""
#endif

namespace dmx {

struct BuildInfo {
    std::string version, compiler;
    std::vector<std::string> host_features;  // instruction sets of the host loops besides the plain one
    std::string toolkit;                     // of CUDA, "13.0"; empty without kernels
    std::vector<std::string> architectures;  // GPUs with machine code, "sm_89"
    std::string ptx;                         // for the drivers of newer GPUs, "compute_120"
};

inline std::string compiler_name() {
#if defined(__clang__)
    return "clang " + std::to_string(__clang_major__) + "." + std::to_string(__clang_minor__);
#elif defined(__GNUC__)
    return "gcc " + std::to_string(__GNUC__) + "." + std::to_string(__GNUC_MINOR__);
#elif defined(_MSC_VER)
    return "msvc " + std::to_string(_MSC_VER);
#else
    return "unknown";
#endif
}

// Architectures as CMake writes them, with commas: "89-real" is machine code, "120-virtual" PTX, "90" both.
inline BuildInfo build_info() {
    BuildInfo info{DREAMMIX_VERSION, compiler_name(), {}, DREAMMIX_CUDA_TOOLKIT, {}, ""};
#if DMX_HAS_CLONES
    info.host_features = {"x86-64-v3", "x86-64-v4"};
#endif
    const std::string listed = std::string(DREAMMIX_CUDA_ARCHITECTURES) + ",";
    for (size_t begin = 0, end = listed.find(','); end != std::string::npos; begin = end + 1, end = listed.find(',', begin)) {
        const std::string entry = listed.substr(begin, end - begin);
        const std::string number = entry.substr(0, entry.find('-'));
        if (number.empty()) continue;
        if (entry.find("-virtual") == std::string::npos) info.architectures.push_back("sm_" + number);
        if (entry.find("-real") == std::string::npos) info.ptx = "compute_" + number;
    }
    return info;
}

}  // namespace dmx
