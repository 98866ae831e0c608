// Waiting for another thread or process: spin, then yield, then sleep.
#pragma once

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <thread>

namespace tps {

constexpr auto kYielding = std::chrono::milliseconds(1);  // then sleep, from which one wakes late
constexpr auto kFirstSleep = std::chrono::microseconds(50), kLongestSleep = std::chrono::microseconds(1000);

inline void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Calls `done` until it is true. `spins`: polls before the core is offered to others; few where there
// are more waiting threads than cores, because one of them then spins in the way of who it waits for.
// Returns false when `deadline_s` (0: none) is over.
template <typename Done>
bool wait_until(const Done& done, int spins, double deadline_s = 0) {
    for (int i = 0; i < spins; ++i) {
        if (done()) return true;
        pause_briefly();
    }
    using Clock = std::chrono::steady_clock;
    const auto begun = Clock::now();
    auto pause = kFirstSleep;
    while (!done()) {
        // By the clock, not by counting: a yield may take as long as others want to use the core.
        const auto waited = Clock::now() - begun;
        if (deadline_s > 0 && std::chrono::duration<double>(waited).count() > deadline_s) return false;
        if (waited < kYielding) {
            sched_yield();
        } else {
            std::this_thread::sleep_for(pause);
            pause = std::min(2 * pause, kLongestSleep);
        }
    }
    return true;
}

}  // namespace tps
