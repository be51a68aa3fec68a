// Warp collectives: 32 lanes meet, the last to arrive does the work for all.
#include <cstdint>
#include <cstring>
#include <vector>

#include "block.h"
#include "device.h"

namespace emulator {
namespace {

// Deposits this lane's operands and returns once `act(warp)` has run over everybody's.
template <class Act>
void meet(const char* operation, int argument, void* operands, Act act) {
  Warp& warp = block.warps[current / kLanes];
  if (warp.arrived == 0) {
    warp.operation = operation;
    warp.argument = argument;
  } else if (warp.operation != operation || warp.argument != argument) {
    fail("reaches %s %d while others of its warp wait in %s %d", operation, argument, warp.operation, warp.argument);
  }
  warp.operands[current % kLanes] = operands;
  if (++warp.arrived < kLanes) return give_way(State::in_warp);
  act(warp);
  warp.arrived = 0;
  const int first = current / kLanes * kLanes;
  for (int t = first; t < first + kLanes; ++t) block.threads[t].state = State::ready;
}

const char kShuffle[] = "shuffle_xor", kLoad[] = "load_matrices", kMultiply[] = "multiply_add";

float from_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float half_to_float(u16 half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const float magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(mantissa, -24)
                                          : std::ldexp(1024 + mantissa, exponent - 25);
  return half >> 15 ? -magnitude : magnitude;
}

const float* half_table() {
  static const std::vector<float> table = [] {
    std::vector<float> values(1 << 16);
    for (int bits = 0; bits < 1 << 16; ++bits) values[bits] = half_to_float(static_cast<u16>(bits));
    return values;
  }();
  return table.data();
}

float to_float(u16 element) {
  static const float* const halves = half_table();
  return fp16 ? halves[element] : from_bits(std::uint32_t{element} << 16);
}

// Rounds to nearest even: a float's spacing at the target's precision is added and taken away again.
u16 to_element(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (!fp16) return std::isnan(value) ? 0x7fff : static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  const u16 sign = bits >> 16 & 0x8000;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return 0x7fff;
  if (magnitude >= 65520) return sign | 0x7c00;
  int exponent = -13;  // zero and the subnormals share one spacing
  if (magnitude >= 0x1p-14f) std::frexp(magnitude, &exponent);
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 11 - exponent)));  // 2^11 carries
  return sign | static_cast<u16>(steps + ((exponent + 13) << 10));
}

float low_half(u32 word) { return to_float(static_cast<u16>(word)); }
float high_half(u32 word) { return to_float(static_cast<u16>(word >> 16)); }

struct Matrices {
  const Chunk* row;
  u32* fragment;
};

void gather(Warp& warp) {
  auto lane = [&](int l) { return static_cast<Matrices*>(warp.operands[l]); };
  for (int matrix = 0; matrix < 4; ++matrix) {
    unsigned banks = 0;
    for (int r = 0; r < 8; ++r)
      banks |= 1u << (reinterpret_cast<std::uintptr_t>(lane(matrix * 8 + r)->row) / sizeof(Chunk) % 8);
    if (banks != 0xff) fail("loads a matrix whose rows share banks of shared memory");
    for (int l = 0; l < kLanes; ++l) lane(l)->fragment[matrix] = lane(matrix * 8 + l / 4)->row->words[l % 4];
  }
}

struct Product {
  float* sum;
  const u32* a;
  u32 b[2];
};

// Layouts of mma.m16n8k16 as in the PTX manual.
void multiply(Warp& warp) {
  float a[16][16], b[16][8], sum[16][8];
  for (int l = 0; l < kLanes; ++l) {
    const Product& own = *static_cast<Product*>(warp.operands[l]);
    const int group = l / 4, pair = l % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const int row = group + i % 2 * 8, column = pair + i / 2 * 8;
      a[row][column] = low_half(own.a[i]);
      a[row][column + 1] = high_half(own.a[i]);
      sum[group + i / 2 * 8][pair + i % 2] = own.sum[i];
    }
    for (int i = 0; i < 2; ++i) {
      b[pair + i * 8][group] = low_half(own.b[i]);
      b[pair + i * 8 + 1][group] = high_half(own.b[i]);
    }
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < 8; ++column) sum[row][column] += a[row][k] * b[k][column];
  for (int l = 0; l < kLanes; ++l)
    for (int i = 0; i < 4; ++i)
      static_cast<Product*>(warp.operands[l])->sum[i] = sum[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
}

}  // namespace
}  // namespace emulator

float shuffle_xor(float value, int lanes) {
  float own[2] = {value, 0};
  emulator::meet(emulator::kShuffle, lanes, own, [lanes](emulator::Warp& warp) {
    for (int l = 0; l < emulator::kLanes; ++l)
      static_cast<float*>(warp.operands[l])[1] = static_cast<float*>(warp.operands[l ^ lanes])[0];
  });
  return own[1];
}

void load_matrices(u32 (&fragment)[4], Shared<Chunk> from, int i) {
  emulator::shared_read(from.at + i, sizeof(Chunk), sizeof(Chunk));
  emulator::Matrices own = {from.at + i, fragment};
  emulator::meet(emulator::kLoad, 0, &own, emulator::gather);
}

void multiply_add(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  emulator::Product own = {sum, a, {b0, b1}};
  emulator::meet(emulator::kMultiply, 0, &own, emulator::multiply);
}

u32 pack(float low, float high) {
  return emulator::to_element(low) | static_cast<u32>(emulator::to_element(high)) << 16;
}
