// The kernel of queue_info_nce that combines parts, by itself.

#pragma once

#include <cmath>
#include <vector>

#include "expect.h"
#include "queue_info_nce_case.h"

namespace medmoco::test {

// Parts of a softmax as the forward kernel leaves them, for queries in tiles of 8.
struct PartsOfSoftmax {
  static constexpr int kQueries = 13, kTileQueries = 8, kParts = 11;
  int embed_dim;
  Schedule schedule = Schedule::of(2, kParts, 2 * kParts);  // a part for each tile of the queue
  std::vector<Statistics> statistics;
  std::vector<float> directions, key;
  std::vector<float> loss, direction;
  std::vector<int32_t> rank;

  explicit PartsOfSoftmax(int embed_dim)
      : embed_dim(embed_dim), loss(kQueries), direction(kQueries * embed_dim), rank(kQueries) {
    std::mt19937_64 random(5);
    std::uniform_real_distribution<float> unit(-1, 1);
    for (int64_t i = 0; i < schedule.parts() * kTileQueries; ++i) {
      // Far apart, none in every fifth, and one query without any negatives.
      const bool none = i % 5 == 0 || i % kTileQueries == 3;
      statistics.push_back({none ? kNoPeak : 30 * unit(random), none ? 0 : 2 + unit(random), 0,
                            none ? 0 : int(i % 7)});
      for (int c = 0; c < width(); ++c) directions.push_back(none ? 0 : unit(random));
    }
    for (int i = 0; i < kQueries * width(); ++i) key.push_back(unit(random));
  }
  int width() const { return int(padded_dim<float>(embed_dim)); }

  void combine(int warps_per_query, uint64_t seed) {
    CombineArguments<float> a{};
    a.key = {key.data(), width(), kQueries, width() / 4};
    a.schedule = schedule;
    a.statistics = statistics.data();
    a.directions = directions.data();
    a.batch = kQueries;
    a.embed_dim = embed_dim;
    a.tile_queries = kTileQueries;
    a.direction_dim = width();
    a.warps_per_query = warps_per_query;
    a.scale = 1.44269504f;
    a.inverse_temperature = 1;
    a.loss = loss.data();
    a.rank = rank.data();
    a.direction = direction.data();
    const int at_once = kCombineWarps / warps_per_query;
    EmulatedDevice device{.seed = seed};
    launch("combine", queue_info_nce_combine_kernel<float>,
           dim3(unsigned((kQueries + at_once - 1) / at_once)), dim3(kCombineThreads),
           kCombineThreads * kLaneColumns * int(sizeof(float)), &device, a);
  }

  void expect_formula(const std::string& text) const {
    for (int query = 0; query < kQueries; ++query) {
      const int tile = query / kTileQueries;
      double sum = 0, ranks = 0;
      std::vector<double> mean(embed_dim);
      for (int block = tile * kParts; block < (tile + 1) * kParts; ++block) {
        const size_t place = size_t(block + tile) * kTileQueries + query % kTileQueries;
        const double weight = std::exp2(double(statistics[place].peak));
        sum += weight * statistics[place].sum;
        ranks += statistics[place].rank;
        for (int c = 0; c < embed_dim; ++c) {
          mean[c] += weight * directions[place * width() + c];
        }
      }
      expect_equal(rank[query], ranks, "rank" + text);
      expect(std::abs(loss[query] - std::log1p(sum)) <= 3e-6 * (1 + std::log1p(sum)),
             "a loss of " + std::to_string(std::log1p(sum)) + ", got " +
                 std::to_string(loss[query]) + text);
      for (int c = 0; c < embed_dim; ++c) {
        const double value =
            sum == 0 ? 0 : (mean[c] / sum - key[query * width() + c]) * sum / (1 + sum);
        expect(std::abs(direction[query * embed_dim + c] - value) <= 1e-5,
               "a direction of " + std::to_string(value) + ", got " +
                   std::to_string(direction[query * embed_dim + c]) + text);
      }
    }
  }
};

inline void test_parts_are_combined_by_any_number_of_warps() {
  for (const int embed_dim : {3, 130, 256}) {
    for (const int warps : {1, 2, 4, 8}) {
      PartsOfSoftmax parts(embed_dim);
      parts.combine(warps, 0);
      parts.expect_formula(", " + std::to_string(warps) + " warps");
      const auto first = parts.direction;
      for (uint64_t seed = 1; seed < 5; ++seed) {
        parts.combine(warps, seed);
        expect(parts.direction == first, "the same bits, seed " + std::to_string(seed));
      }
    }
  }
}

}  // namespace medmoco::test
