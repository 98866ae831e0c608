// Ranks in threads that exchange rounds through one region, for the sanitizers to watch.
//
//     collective_stress RANKS ROUNDS
//
// Every round each rank writes words that tell rank, round and place, as many as the round says, and
// reads those of all others; now and then one lags. At last the others meet without rank 0, and are
// to name it. Exit status 0: all that was read is what was written; 1: it is not (a line says where).

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "collective.h"

namespace {

constexpr size_t kHeaderBytes = 128, kFirstBuffer = 4096, kBufferBytes = 1 << 14;
constexpr double kPatientS = 60, kImpatientS = 0.2;

class Region {
  public:
    explicit Region(int ranks) : words_((kFirstBuffer + 2 * ranks * kBufferBytes) / sizeof(uint64_t)) {}
    uint8_t* data() { return reinterpret_cast<uint8_t*>(words_.data()); }

  private:
    std::vector<uint64_t> words_;
};

uint32_t mix(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t h = a * 0x9e3779b1u ^ b * 0x85ebca77u ^ c * 0xc2b2ae3du;
    h ^= h >> 15;
    return h * 0x2c1b3c6du;
}

class Stress {
  public:
    Stress(int ranks, int rounds)
        : ranks_(ranks), rounds_(rounds), region_(ranks), region_without_rank_0_(ranks) {}

    bool run() {
        std::vector<std::thread> threads;
        for (int rank = 0; rank < ranks_; ++rank) threads.emplace_back([this, rank] { run_rank(rank); });
        for (std::thread& thread : threads) thread.join();
        return !failed_;
    }

  private:
    tps::Collective join(Region& region, int rank, double deadline_s) const {
        const bool crowded = ranks_ > int(std::thread::hardware_concurrency());
        return {region.data(), kHeaderBytes, kFirstBuffer, kBufferBytes, rank, ranks_, crowded, deadline_s};
    }

    void run_rank(int rank) {
        exchange_rounds(rank);
        if (rank > 0) miss_rank_0(rank);
    }

    void exchange_rounds(int rank) {
        tps::Collective collective = join(region_, rank, kPatientS);
        for (int round = 1; round <= rounds_ && !failed_; ++round) {
            const int words = 1 + mix(0, round, 0) % (kBufferBytes / sizeof(uint32_t));
            lag(rank, round);
            uint32_t* mine = reinterpret_cast<uint32_t*>(collective.next_buffer());
            for (int i = 0; i < words; ++i) mine[i] = mix(rank, round, i);
            const int silent = collective.exchange();
            if (silent >= 0) return fail("silent", rank, round, silent);
            for (int peer = 0; peer < ranks_; ++peer) {
                const auto* posted = reinterpret_cast<const uint32_t*>(collective.posted_buffer(peer));
                for (int i = 0; i < words; ++i)
                    if (posted[i] != mix(peer, round, i)) return fail("mixed up", rank, round, peer);
            }
        }
    }

    void miss_rank_0(int rank) {
        const int silent = join(region_without_rank_0_, rank, kImpatientS).exchange();
        if (silent != 0) fail("not missed", rank, 1, silent);
    }

    static void lag(int rank, int round) {
        const uint32_t chance = mix(rank, round, 1) % 64;
        if (chance == 0) std::this_thread::sleep_for(std::chrono::microseconds(300));
        if (chance < 4) std::this_thread::yield();
    }

    void fail(const char* what, int rank, int round, int peer) {
        failed_ = true;
        fprintf(stderr, "%s: rank %d, round %d, peer %d\n", what, rank, round, peer);
    }

    const int ranks_, rounds_;
    Region region_, region_without_rank_0_;
    std::atomic<bool> failed_{false};
};

}  // namespace

int main(int count, char** arguments) {
    if (count != 3) return 2;
    return Stress(atoi(arguments[1]), atoi(arguments[2])).run() ? 0 : 1;
}
