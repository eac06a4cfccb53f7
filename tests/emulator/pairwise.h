// Cases in which any two values of any two factors meet.

#pragma once

#include <array>
#include <cstddef>
#include <set>
#include <tuple>
#include <vector>

#include "emulator/random.h"

namespace medmoco::test {

template <size_t kFactors>
using Choice = std::array<int, kFactors>;  // of a value for each factor

// Of 30 choices, the one in which most values meet that have not met yet, until all have.
template <size_t kFactors>
std::vector<Choice<kFactors>> pairwise_choices(const Choice<kFactors>& counts) {
  using Pair = std::tuple<int, int, int, int>;  // a factor and its value, a later one and its value
  std::set<Pair> apart;
  const auto for_each_pair = [](const Choice<kFactors>& choice, auto visit) {
    for (int f = 0; f < int(choice.size()); ++f) {
      for (int g = f + 1; g < int(choice.size()); ++g) visit(Pair{f, choice[f], g, choice[g]});
    }
  };
  for_each_pair(counts, [&](const Pair& pair) {
    const auto [f, f_count, g, g_count] = pair;
    for (int a = 0; a < f_count; ++a) {
      for (int b = 0; b < g_count; ++b) apart.insert({f, a, g, b});
    }
  });
  emulator::Random random(4);
  std::vector<Choice<kFactors>> choices;
  while (!apart.empty()) {
    Choice<kFactors> best{};
    int most = 0;
    for (int attempt = 0; attempt < 30; ++attempt) {
      Choice<kFactors> choice;
      for (size_t f = 0; f < choice.size(); ++f) choice[f] = int(random.below(counts[f]));
      const auto [f, a, g, b] = *apart.begin();
      choice[f] = a;
      choice[g] = b;
      int meet = 0;
      for_each_pair(choice, [&](const Pair& pair) { meet += int(apart.count(pair)); });
      if (meet > most) best = choice, most = meet;
    }
    for_each_pair(best, [&](const Pair& pair) { apart.erase(pair); });
    choices.push_back(best);
  }
  return choices;
}

}  // namespace medmoco::test
