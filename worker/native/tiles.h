// Tiles of numbers and their products (Intel AMX): besides simd.h the only file that knows instructions.
//
// A tile has up to 16 rows of 64 bytes. Tiles 0 to 3 hold sums [tokens][16 rows of a weight], 4 and 5
// activations [tokens][32 columns] in bf16, 6 and 7 weights as they are packed (tensors.h), one group of a
// row block each: [16 pairs of columns][16 rows][2].
#pragma once

#if defined(__AMX_TILE__)

#include <cstddef>
#include <cstdint>

#include "simd.h"

namespace tps::TPS_LEVEL {

constexpr int kTileRows = 16, kTileRowBytes = 64;

// Gives the tiles of this thread their shapes, and takes them back at the end: a thread that holds none
// is switched sooner.
class Tiles {
  public:
    explicit Tiles(int tokens) {
        struct {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } shapes;
        for (int tile = 0; tile < 8; ++tile) {
            shapes.row_bytes[tile] = kTileRowBytes;
            shapes.rows[tile] = uint8_t(tile < 6 ? tokens : kTileRows);
        }
        __asm__ volatile("ldtilecfg %0" ::"m"(shapes));
    }
    ~Tiles() { __asm__ volatile("tilerelease"); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

// The compiler's intrinsics do not say that they read memory, and take no constant of a template.
template <int tile>
TPS_INLINE void tile_zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int tile>
TPS_INLINE void tile_load(const void* from, size_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
TPS_INLINE void tile_store(void* to, size_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
}
// sums += activations times weights: the products of the group are added up first, those of even and of
// odd columns apart, and their sum is added to what was there. Denormals are zeros.
template <int sums, int x, int w>
TPS_INLINE void tile_dot_bf16() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(x), "i"(w));
}

}  // namespace tps::TPS_LEVEL

#endif
