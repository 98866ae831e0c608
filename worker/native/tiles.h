// Tiles of numbers and their products (Intel AMX): besides simd.h the only file that knows instructions.
//
// There are eight tiles; each has up to 16 rows of 64 bytes, of bf16 in pairs or of floats.
#pragma once

#if defined(__AMX_TILE__)

#include <cstddef>
#include <cstdint>

#include "simd.h"

namespace tps::TPS_LEVEL {

constexpr int kTileRows = 16, kTileRowBytes = 64;

// Tiles 0 to 5, of sums and of what is multiplied from the left, have so many rows; 6 and 7 are whole.
struct TileShapes {
    explicit TileShapes(int left_rows) {
        for (int tile = 0; tile < 8; ++tile) {
            row_bytes[tile] = kTileRowBytes;
            rows[tile] = uint8_t(tile < 6 ? left_rows : kTileRows);
        }
    }
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Gives the tiles of this thread their shapes, and takes them back at the end: a thread that holds none
// is switched sooner.
class Tiles {
  public:
    explicit Tiles(const TileShapes& shapes) { __asm__ volatile("ldtilecfg %0" ::"m"(shapes)); }
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
// Tiles 0, 1, ... side by side: 16 floats of each row after those of the one before.
TPS_INLINE void load_tiles(int count, const float* from, size_t stride) {
    tile_load<0>(from, stride);
    if (count > 1) tile_load<1>(from + 16, stride);
    if (count > 2) tile_load<2>(from + 32, stride);
    if (count > 3) tile_load<3>(from + 48, stride);
}
TPS_INLINE void store_tiles(int count, float* to, size_t stride) {
    tile_store<0>(to, stride);
    if (count > 1) tile_store<1>(to + 16, stride);
    if (count > 2) tile_store<2>(to + 32, stride);
    if (count > 3) tile_store<3>(to + 48, stride);
}
// sums [M][N] += a [M][K] times b [K / 2][N][2]: the products of up to 32 columns K are added up first, those
// of even and of odd ones apart, and their sum is added to what was there. Denormals are zeros.
template <int sums, int a, int b>
TPS_INLINE void tile_dot_bf16() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(a), "i"(b));
}

}  // namespace tps::TPS_LEVEL

#endif
