#include "collective.h"

#include <atomic>

#include "waiting.h"

namespace tps {

static_assert(std::atomic<uint64_t>::is_always_lock_free, "works between processes only without locks");

int Collective::exchange() {
    ++round_;
    const auto posted = [this](int rank) {
        return reinterpret_cast<std::atomic<uint64_t>*>(region_ + rank * header_bytes_);
    };
    posted(rank_)->store(round_, std::memory_order_release);
    int missing = 0;  // all ranks before it have posted
    const auto all_posted = [&] {
        while (missing < world_ && posted(missing)->load(std::memory_order_acquire) >= round_) ++missing;
        return missing == world_;
    };
    return wait_until(all_posted, spins_, deadline_s_) ? -1 : missing;
}

}  // namespace tps
