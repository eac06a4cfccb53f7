// Number formats and the products of the tensor cores.

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "cuda/primitives.cuh"
#include "expect.h"

using namespace medmoco;
using test::expect;
using test::expect_equal;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

template <typename Scalar>
void expect_rounding(float value, float rounded) {
  expect_equal(to_float(from_float<Scalar>(value)), rounded,
               "rounding of " + std::to_string(value));
}

void test_every_16_bit_number_survives_float32() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const Half half{static_cast<uint16_t>(bits)};
    const BFloat16 bfloat16{static_cast<uint16_t>(bits)};
    if (std::isnan(to_float(half))) {
      expect(std::isnan(to_float(from_float<Half>(to_float(half)))), "a NaN");
    } else {
      expect(from_float<Half>(to_float(half)).bits == bits, "the same half");
    }
    if (std::isnan(to_float(bfloat16))) {
      expect(std::isnan(to_float(from_float<BFloat16>(to_float(bfloat16)))), "a NaN");
    } else {
      expect(from_float<BFloat16>(to_float(bfloat16)).bits == bits, "the same bfloat16");
    }
  }
}

// Halfway between two neighbours the one whose last bit is 0 is taken; a hair beyond, the nearer.
template <typename Scalar>
void test_rounding_to_nearest_even(uint32_t numbers) {
  for (uint32_t bits = 0; bits + 1 < numbers; ++bits) {
    const float low = to_float(Scalar{static_cast<uint16_t>(bits)});
    const float high = to_float(Scalar{static_cast<uint16_t>(bits + 1)});
    const float middle = static_cast<float>((double(low) + high) / 2);
    if (middle == low || middle == high) continue;  // float32 has no number between
    expect_rounding<Scalar>(middle, bits % 2 == 0 ? low : high);
    expect_rounding<Scalar>(std::nextafter(middle, kInfinity), high);
    expect_rounding<Scalar>(-std::nextafter(middle, 0.0f), -low);
  }
}

void test_rounding_by_hand() {
  expect_equal(to_float(Half{0x3c00}), 1, "half 0x3c00");
  expect_equal(to_float(Half{0x0001}), 0x1p-24, "half 0x0001");
  expect_equal(to_float(Half{0x7bff}), 65504, "half 0x7bff");
  expect_equal(to_float(BFloat16{0xc040}), -3, "bfloat16 0xc040");
  expect_rounding<Half>(65519.996f, 65504);
  expect_rounding<Half>(65520, kInfinity);
  expect_rounding<Half>(-1e30f, -kInfinity);
  expect_rounding<Half>(0x1p-25f, 0);
  expect_rounding<Half>(kNaN, kNaN);
  expect_rounding<BFloat16>(std::numeric_limits<float>::max(), kInfinity);
  expect_rounding<BFloat16>(kNaN, kNaN);
  expect(pack<BFloat16>(1, -3) == 0xc0403f80u, "the first argument in the lower half");
  expect(pack<Half>(1, -3) == 0xc2003c00u, "the first argument in the lower half");
}

void test_tf32_rounds_ties_away_from_zero() {
  const auto rounded = [](float value) { return std::bit_cast<float>(round_to_tf32(value)); };
  expect_equal(rounded(1 + 0x1p-11f), 1 + 0x1p-10f, "a tie");
  expect_equal(rounded(-1 - 0x1p-11f), -1 - 0x1p-10f, "a negative tie");
  expect_equal(rounded(1 + 0x1p-11f - 0x1p-23f), 1, "just below a tie");
  expect_equal(rounded(2 - 0x1p-20f), 2, "a carry into the exponent");
  expect_equal(rounded(std::numeric_limits<float>::max()), kInfinity, "overflow");
  expect_equal(rounded(-kInfinity), -kInfinity, "minus infinity");
  expect_equal(rounded(kNaN), kNaN, "NaN");
  expect_equal(rounded(std::bit_cast<float>(0x7f800001u)), kNaN, "NaN with low bits only");
}

void test_exp2_flushes_what_is_subnormal() {
  expect_equal(exp2_fast(3), 8, "2^3");
  expect_equal(exp2_fast(-126), 0x1p-126, "2^-126");
  expect_equal(exp2_fast(-126.5f), 0, "2^-126.5");
  expect_equal(exp2_fast(-kInfinity), 0, "2^-infinity");
  expect_equal(exp2_fast(kInfinity), kInfinity, "2^infinity");
  expect_equal(exp2_fast(kNaN), kNaN, "2^NaN");
}

void test_bits_are_counted() {
  expect_equal(count_bits(0), 0, "bits of 0");
  expect_equal(count_bits(0x80000001u), 2, "bits of 0x80000001");
}

void test_what_is_not_below_is_counted() {
  const auto counted = [](float a, float b) {
    int count = 5;
    count_unless_below(count, a, b);
    return count - 5;
  };
  expect_equal(counted(1, 2), 0, "1 < 2");
  expect_equal(counted(2, 2), 1, "2 = 2");
  expect_equal(counted(3, 2), 1, "3 > 2");
  expect_equal(counted(kNaN, 2), 1, "NaN and 2");
  expect_equal(counted(-kInfinity, kNaN), 1, "-infinity and NaN");
}

// One tag each for the three products.
struct TF32 {
  static constexpr int kDepth = 8;
  static void mma(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k8(sum, a, b[0], b[1]);
  }
  static float seen(float value) {  // by the tensor core
    return std::bit_cast<float>(std::bit_cast<uint32_t>(value) & 0xffffe000u);
  }
};
template <typename Scalar>
struct Bits16 {
  static constexpr int kDepth = 16;
  static void mma(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k16<Scalar>(sum, a, b[0], b[1]);
  }
  static float seen(float value) { return to_float(from_float<Scalar>(value)); }
};

struct Matrices {
  const float *a, *b;  // (16, depth), (depth, 8)
  float* sum;          // (16, 8)
};

template <typename Format>
uint32_t operand_register(const float* values, int stride) {
  if constexpr (std::is_same_v<Format, TF32>) {
    return std::bit_cast<uint32_t>(values[0]);
  } else if constexpr (std::is_same_v<Format, Bits16<Half>>) {
    return pack<Half>(values[0], values[stride]);
  } else {
    return pack<BFloat16>(values[0], values[stride]);
  }
}

// The fragments as the PTX ISA lays them out: with g = lane / 4 and t = lane % 4, register r of a
// is row g + 8 (r % 2); its column is t + 4 (r / 2) for TF32, 2 t + 8 (r / 2) for 16 bits, of two
// elements. Register r of b is column g, its row as the column of a. c_i is row g + 8 (i / 2),
// column 2 t + i % 2.
template <typename Format>
__global__ void __launch_bounds__(32) mma_kernel(Matrices m) {
  constexpr int kDepth = Format::kDepth, kWidth = kDepth / 8;
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t a[4], b[2];
  for (int r = 0; r < 4; ++r) {
    const int row = g + r % 2 * 8, column = kWidth * t + r / 2 * 4 * kWidth;
    a[r] = operand_register<Format>(m.a + row * kDepth + column, 1);
  }
  for (int r = 0; r < 2; ++r) {
    b[r] = operand_register<Format>(m.b + (kWidth * t + r * 4 * kWidth) * 8 + g, 8);
  }
  float c[4];
  for (int i = 0; i < 4; ++i) c[i] = m.sum[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  Format::mma(c, a, b);
  for (int i = 0; i < 4; ++i) m.sum[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i];
}

template <typename Format>
std::vector<float> multiply(const std::vector<float>& a, const std::vector<float>& b,
                            std::vector<float> sum) {
  EmulatedDevice device{.seed = 3};
  launch("mma", mma_kernel<Format>, 1, 32, 0, &device, Matrices{a.data(), b.data(), sum.data()});
  return sum;
}

template <typename Format>
void test_mma_matches_a_loop() {
  constexpr int kDepth = Format::kDepth;
  std::mt19937 generator(kDepth);
  std::normal_distribution<float> normal;
  std::vector<float> a(16 * kDepth), b(kDepth * 8), start(16 * 8);
  for (auto* values : {&a, &b, &start}) {
    for (float& value : *values) value = normal(generator);
  }
  const std::vector<float> sum = multiply<Format>(a, b, start);
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      double expected = start[row * 8 + column], magnitude = std::abs(expected);
      for (int depth = 0; depth < kDepth; ++depth) {
        const double product =
            double(Format::seen(a[row * kDepth + depth])) * Format::seen(b[depth * 8 + column]);
        expected += product;
        magnitude += std::abs(product);
      }
      const double error = std::abs(sum[row * 8 + column] - expected);
      expect(error <= 0x1p-23 * magnitude, "the product of a loop");
    }
  }
}

template <typename Format>
void test_mma_spreads_what_is_not_finite_to_its_row_or_column() {
  constexpr int kDepth = Format::kDepth;
  std::vector<float> a(16 * kDepth, 1), b(kDepth * 8, 1);
  a[5 * kDepth + 3] = kNaN;
  b[2 * 8 + 6] = kInfinity;
  const std::vector<float> sum = multiply<Format>(a, b, std::vector<float>(16 * 8, 0));
  for (int i = 0; i < 16 * 8; ++i) {
    const float expected = i / 8 == 5 ? kNaN : i % 8 == 6 ? kInfinity : kDepth;
    expect_equal(sum[i], expected, "element " + std::to_string(i));
  }
}

void test_mma_truncates_tf32_operands_that_were_not_rounded() {
  const float almost_two = 2 - 0x1p-23f;
  const auto sum = multiply<TF32>(std::vector<float>(16 * 8, almost_two),
                                  std::vector<float>(8 * 8, 1), std::vector<float>(16 * 8, 0));
  expect_equal(sum[0], 8 * (2 - 0x1p-10), "eight truncated operands");
}

void test_mma_truncates_its_sum_towards_zero() {
  const auto added_to_one = [](float value) {
    std::vector<float> a(16 * 8, 0), start(16 * 8, 1);
    a[0] = value;
    start[1] = -1;
    return multiply<TF32>(a, std::vector<float>(8 * 8, 1), start);
  };
  expect_equal(added_to_one(0x1.8p-23f)[0], 1 + 0x1p-23, "1 + 1.5 units in the last place");
  expect_equal(added_to_one(0x1.8p-23f)[1], -1 + 0x1p-23 + 0x1p-24, "-1 + 3 smaller units");
  expect_equal(added_to_one(-0x1.8p-23f)[1], -1 - 0x1p-23, "-1 - 1.5 units in the last place");
  expect_equal(added_to_one(-0x1p-25f)[0], 1 - 0x1p-24, "1 - half a smaller unit");
}

}  // namespace

int main() {
  test_every_16_bit_number_survives_float32();
  test_rounding_to_nearest_even<Half>(0x7c00);
  test_rounding_to_nearest_even<BFloat16>(0x7f80);
  test_rounding_by_hand();
  test_tf32_rounds_ties_away_from_zero();
  test_exp2_flushes_what_is_subnormal();
  test_bits_are_counted();
  test_what_is_not_below_is_counted();
  test_mma_matches_a_loop<TF32>();
  test_mma_matches_a_loop<Bits16<BFloat16>>();
  test_mma_matches_a_loop<Bits16<Half>>();
  test_mma_spreads_what_is_not_finite_to_its_row_or_column<TF32>();
  test_mma_spreads_what_is_not_finite_to_its_row_or_column<Bits16<BFloat16>>();
  test_mma_spreads_what_is_not_finite_to_its_row_or_column<Bits16<Half>>();
  test_mma_truncates_tf32_operands_that_were_not_rounded();
  test_mma_truncates_its_sum_towards_zero();
  return test::report();
}
