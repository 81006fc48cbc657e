// Which instruction sets the kernels use: what this machine has, or less where that was asked for.
#pragma once

#include <string>
#include <vector>

namespace fastdiff {

// In order: a machine of one level runs the kernels of every level before it.
enum class Level : int { baseline = 0, avx2, avx512, avx512_vnni, avx512_bf16, amx };
constexpr int kLevels = 6;

const char* level_name(Level level);

// The highest level that this machine and its operating system allow, asked once.
Level highest_level();

// The level in use: `highest_level`, unless FASTDIFF_CPU_CAPABILITY or `set_level` says less.
Level level();

// Throws std::runtime_error for unknown names and for levels that this machine does not have.
void set_level(const std::string& name);

std::vector<std::string> available_levels();

}  // namespace fastdiff
