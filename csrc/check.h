// Argument checks of the ops: a message that names the op, the argument, what is expected and what was given.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace fastdiff {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

}  // namespace fastdiff

#define FASTDIFF_CHECK(condition, ...) \
  do {                                 \
    if (!(condition)) ::fastdiff::fail(__VA_ARGS__); \
  } while (0)
