// An aligned text table: the first column to the left, numbers to the right.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "cli/terminal.h"

namespace octomoe::cli {

// Characters on the screen: UTF-8 continuation bytes do not count.
inline std::size_t display_width(std::string_view text) {
  return static_cast<std::size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xc0) != 0x80; }));
}

class Table {
 public:
  struct Column {
    std::string title;
    bool left = false;
  };
  struct Cell {
    Cell(std::string t, Style s = Style::plain) : text(std::move(t)), style(s) {}
    Cell(const char* t) : text(t) {}
    std::string text;
    Style style = Style::plain;
  };

  explicit Table(std::vector<Column> columns) : columns_(std::move(columns)) {}
  void add(std::vector<Cell> row) {
    row.resize(columns_.size(), Cell(""));
    rows_.push_back(std::move(row));
  }
  bool empty() const { return rows_.empty(); }

  // Two spaces between columns, no trailing blanks.
  std::string render(bool colour) const {
    std::vector<std::size_t> width;
    for (std::size_t c = 0; c < columns_.size(); ++c) {
      width.push_back(display_width(columns_[c].title));
      for (const auto& row : rows_) width[c] = std::max(width[c], display_width(row[c].text));
    }
    std::string out;
    const auto line = [&](auto&& cell_of) {
      std::string text;
      std::size_t pending = 0;  // blanks owed before the next visible character
      for (std::size_t c = 0; c < columns_.size(); ++c) {
        const Cell cell = cell_of(c);
        const std::size_t pad = width[c] - display_width(cell.text);
        if (c > 0) pending += 2;
        if (!columns_[c].left) pending += pad;
        if (!cell.text.empty()) {
          text.append(pending, ' ');
          pending = 0;
          text += styled(cell.text, cell.style, colour);
        }
        if (columns_[c].left) pending += pad;
      }
      out += text + "\n";
    };
    line([&](std::size_t c) { return Cell(columns_[c].title, Style::bold); });
    for (const auto& row : rows_) line([&](std::size_t c) { return row[c]; });
    return out;
  }

 private:
  std::vector<Column> columns_;
  std::vector<std::vector<Cell>> rows_;
};

// 0.0123 -> "1.23 %"; exact zero -> "0"; tiny values keep two digits.
inline std::string format_error(double e) {
  if (std::isnan(e)) return "NaN";
  if (e == 0.0) return "0";
  const double percent = 100.0 * e;
  return percent >= 0.01 ? fmt::format("{:.{}f} %", percent, percent < 0.1 ? 3 : 2) : fmt::format("{:.1e}", e);
}

// Three or four significant digits, unit chosen by size.
inline std::string format_us(double us) {
  if (!std::isfinite(us)) return "-";
  if (us < 10) return fmt::format("{:.2f} us", us);
  if (us < 100) return fmt::format("{:.1f} us", us);
  if (us < 10'000) return fmt::format("{:.0f} us", us);
  if (us < 100'000) return fmt::format("{:.2f} ms", us / 1e3);
  if (us < 1'000'000) return fmt::format("{:.1f} ms", us / 1e3);
  return fmt::format("{:.2f} s", us / 1e6);
}

inline std::string format_bytes(double bytes) {
  static constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  int unit = 0;
  while (bytes >= 1024.0 && unit < 4) bytes /= 1024.0, ++unit;
  if (unit == 0) return fmt::format("{:.0f} B", bytes);
  return fmt::format("{:.{}f} {}", bytes, bytes < 10 ? 2 : bytes < 100 ? 1 : 0, kUnits[unit]);
}

inline std::string format_ratio(double ratio) {
  return std::isfinite(ratio) ? fmt::format("{:.{}f}x", ratio, ratio < 0.1 ? 3 : 2) : "-";
}

}  // namespace octomoe::cli
