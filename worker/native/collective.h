// Collectives among the processes of one host, through memory that they share.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tps {

// One rank's end. The region's layout is in shared/shm.py: for each rank a header whose first eight
// bytes count the rounds that it has posted, and two buffers, which rounds use in turn. Two suffice: a
// rank comes to round k + 2 only when all peers have posted round k + 1, and a peer posts that only
// after it has finished reading round k.
class Collective {
  public:
    Collective(uint8_t* region, size_t header_bytes, size_t first_buffer, size_t buffer_bytes, int rank,
               int world, bool crowded, double deadline_s)
        : region_(region), header_bytes_(header_bytes), first_buffer_(first_buffer),
          buffer_bytes_(buffer_bytes), rank_(rank), world_(world), spins_(crowded ? 8 : 2000),
          deadline_s_(deadline_s) {}

    int rank() const { return rank_; }
    int world() const { return world_; }
    size_t buffer_bytes() const { return buffer_bytes_; }

    // Where this rank writes for the round that comes next.
    uint8_t* next_buffer() { return buffer(rank_, round_ + 1); }
    // What a rank wrote for the last round; valid until this rank posts the next but one.
    const uint8_t* posted_buffer(int rank) const { return buffer(rank, round_); }

    // Posts what was written into `next_buffer` and waits until all ranks have posted theirs. Returns
    // -1, or a rank that stayed silent for longer than the deadline.
    int exchange();

  private:
    uint8_t* buffer(int rank, uint64_t round) const {
        return region_ + first_buffer_ + (2 * size_t(rank) + (round & 1)) * buffer_bytes_;
    }

    uint8_t* const region_;
    const size_t header_bytes_, first_buffer_, buffer_bytes_;
    const int rank_, world_, spins_;
    const double deadline_s_;
    uint64_t round_ = 0;
};

}  // namespace tps
