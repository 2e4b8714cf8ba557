// What a person at a terminal gets and a pipe does not: colours and a progress line.
#pragma once

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>

namespace octomoe::cli {

enum class Style { plain, bold, dim, good, bad, warn };

inline bool is_terminal(int fd) {
  const char* term = std::getenv("TERM");
  return isatty(fd) && !(term && std::string_view(term) == "dumb");
}

// https://no-color.org: set and not empty switches colours off.
inline bool wants_colour(int fd = STDOUT_FILENO) {
  const char* no_color = std::getenv("NO_COLOR");
  return is_terminal(fd) && !(no_color && *no_color);
}

inline std::string styled(std::string_view text, Style style, bool colour) {
  static constexpr const char* kCodes[] = {"", "1", "2", "32", "31", "33"};
  if (!colour || style == Style::plain || text.empty()) return std::string(text);
  return fmt::format("\x1b[{}m{}\x1b[0m", kCodes[static_cast<int>(style)], text);
}

inline int terminal_width(int fd) {
  winsize size{};
  return ioctl(fd, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

// One line on stderr, redrawn at most ten times a second, wiped at the end. Silent when stderr is not a terminal.
class Progress {
 public:
  explicit Progress(std::string label) : label_(std::move(label)), on_(is_terminal(STDERR_FILENO)) {}
  ~Progress() { clear(); }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void update(double fraction, std::string_view text = {}) {
    using namespace std::chrono;
    if (!on_) return;
    const auto now = steady_clock::now();
    if (drawn_ && now - last_ < milliseconds(100) && fraction < 1.0) return;
    last_ = now;
    drawn_ = true;
    const std::string line = render(label_, fraction, text, terminal_width(STDERR_FILENO) - 1);
    std::fprintf(stderr, "\r\x1b[K%s", line.c_str());
    std::fflush(stderr);
  }
  void clear() {
    if (drawn_) std::fputs("\r\x1b[K", stderr);
    if (drawn_) std::fflush(stderr);
    drawn_ = false;
  }

  // "label [#####.....]  50%  text", cut to `width` characters.
  static std::string render(std::string_view label, double fraction, std::string_view text, int width) {
    constexpr int kBar = 24;
    fraction = std::clamp(fraction, 0.0, 1.0);
    const int full = static_cast<int>(fraction * kBar);
    std::string line = fmt::format("{} [{}{}] {:3d}%{}{}", label, std::string(static_cast<std::size_t>(full), '#'),
                                   std::string(static_cast<std::size_t>(kBar - full), '.'),
                                   static_cast<int>(fraction * 100), text.empty() ? "" : "  ", text);
    if (width > 0 && line.size() > static_cast<std::size_t>(width)) line.resize(static_cast<std::size_t>(width));
    return line;
  }

 private:
  std::string label_;
  bool on_, drawn_ = false;
  std::chrono::steady_clock::time_point last_;
};

}  // namespace octomoe::cli
