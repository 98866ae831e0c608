#include "dispatch.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <cstring>
#include <string>

namespace tps {

#define TPS_DECLARE(level) \
    namespace level {      \
    extern const Kernels kernels[2]; \
    }
#ifdef TPS_HAVE_AMX
TPS_DECLARE(amx)
#endif
#ifdef TPS_HAVE_AVX512BF16
TPS_DECLARE(avx512bf16)
#endif
#ifdef TPS_HAVE_AVX512VNNI
TPS_DECLARE(avx512vnni)
#endif
#ifdef TPS_HAVE_AVX512
TPS_DECLARE(avx512)
#endif
#ifdef TPS_HAVE_AVXVNNI
TPS_DECLARE(avxvnni)
#endif
#ifdef TPS_HAVE_AVX2
TPS_DECLARE(avx2)
#endif
#ifdef TPS_HAVE_NEON
TPS_DECLARE(neon)
#endif
TPS_DECLARE(scalar)

namespace {

struct Level {
    const Kernels* kernels;  // of each Prefetch
    bool runs;
};

#if defined(__x86_64__)
// CPUID leaf 7: what not every compiler's __builtin_cpu_supports has a name for.
struct Leaf7 {
    uint32_t a = 7, b = 0, c, d = 0;
    explicit Leaf7(uint32_t subleaf) : c(subleaf) {
        __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    }
};
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool has_avx512bf16() { return has_avx512vnni() && __builtin_cpu_supports("avx512bf16"); }
#if defined(TPS_HAVE_AMX)
// The system lets only a process use tiles that has asked.
bool has_amx() {
    constexpr uint32_t wanted = 1u << 22 | 1u << 24;  // bf16, tiles
    constexpr int kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return (Leaf7(0).d & wanted) == wanted && syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
}
#endif
#if defined(TPS_HAVE_AVXVNNI)
bool has_avxvnni() { return has_avx2() && (Leaf7(1).a >> 4 & 1); }
#endif
#endif

#if defined(__x86_64__)
bool is_amd() { return __builtin_cpu_is("amd"); }
#else
bool is_amd() { return false; }
#endif
Prefetch usual_prefetch() { return is_amd() ? kFar : kNear; }

// The best first.
const Level kLevels[] = {
#ifdef TPS_HAVE_AMX
    {amx::kernels, has_avx512bf16() && has_amx()},
#endif
#ifdef TPS_HAVE_AVX512BF16
    {avx512bf16::kernels, has_avx512bf16() && is_amd()},
#endif
#ifdef TPS_HAVE_AVX512VNNI
    {avx512vnni::kernels, has_avx512vnni()},
#endif
#ifdef TPS_HAVE_AVX512BF16
    // On Intel's cores pairs of bf16 take as long as two products of floats, and have to be made first:
    // with 32 tokens 0.8 times as fast as floats on Granite Rapids, 1.7 times on Zen 4.
    {avx512bf16::kernels, has_avx512bf16() && !is_amd()},
#endif
#ifdef TPS_HAVE_AVX512
    {avx512::kernels, has_avx512()},
#endif
#ifdef TPS_HAVE_AVXVNNI
    {avxvnni::kernels, has_avxvnni()},
#endif
#ifdef TPS_HAVE_AVX2
    {avx2::kernels, has_avx2()},
#endif
#ifdef TPS_HAVE_NEON
    {neon::kernels, true},  // the dot product instructions are in every core since ARMv8.2
#endif
    {scalar::kernels, true},
};

bool is_set(const char* text) { return text != nullptr && *text != '\0'; }

struct Choice {
    const Kernels* kernels = nullptr;
    std::string problem;

    Choice() {
        const char* wanted = std::getenv("TPSERVE_PREFETCH");
        Prefetch prefetch = usual_prefetch();
        if (is_set(wanted)) {
            prefetch = std::strcmp(wanted, "far") ? kNear : kFar;
            if (prefetch == kNear && std::strcmp(wanted, "near")) {
                problem = std::string("TPSERVE_PREFETCH is ") + wanted + "; it can be near or far";
                return;
            }
        }
        wanted = std::getenv("TPSERVE_ISA");
        std::string names;
        for (const Level& level : kLevels) {
            if (!level.runs) continue;
            if (!is_set(wanted) || !std::strcmp(wanted, level.kernels->name)) {
                kernels = level.kernels + prefetch;
                return;
            }
            names += std::string(names.empty() ? "" : ", ") + level.kernels->name;
        }
        problem = std::string("TPSERVE_ISA is ") + wanted + ", this machine runs " + names;
    }
};

const Choice& choice() {
    static const Choice made;
    return made;
}

}  // namespace

const Kernels* kernels() { return choice().kernels; }
const char* kernels_problem() { return choice().problem.c_str(); }

}  // namespace tps
