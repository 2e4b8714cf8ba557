#include "jit/report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>

namespace octomoe::jit {
namespace {

template <class Fn>
void for_each_line(std::string_view text, const Fn& fn) {
  while (!text.empty()) {
    const std::size_t end = text.find('\n');
    std::string_view line = text.substr(0, end);
    if (line.ends_with('\r')) line.remove_suffix(1);
    fn(line);
    text = end == std::string_view::npos ? std::string_view() : text.substr(end + 1);
  }
}

bool is_digit(char c) { return c >= '0' && c <= '9'; }

// The number that stands before `words`: "ptxas info : Used 34 registers, 16 bytes smem" with " bytes smem" is 16.
// -1 if the words are not there.
int number_before(std::string_view line, std::string_view words) {
  const std::size_t at = line.find(words);
  if (at == std::string_view::npos) return -1;
  std::size_t begin = at;
  while (begin > 0 && is_digit(line[begin - 1])) --begin;
  if (begin == at || at - begin > 9) return -1;
  int n = 0;
  for (std::size_t i = begin; i < at; ++i) n = 10 * n + (line[i] - '0');
  return n;
}

bool has_c75_code(std::string_view line) {
  for (std::size_t at = line.find("C75"); at != std::string_view::npos; at = line.find("C75", at + 1)) {
    if (at + 5 <= line.size() && is_digit(line[at + 3]) && is_digit(line[at + 4])) return true;
  }
  return false;
}

std::string trimmed(std::string_view s) {
  const auto space = [](char c) { return std::isspace(static_cast<unsigned char>(c)) != 0; };
  while (!s.empty() && space(s.front())) s.remove_prefix(1);
  while (!s.empty() && space(s.back())) s.remove_suffix(1);
  return std::string(s);
}

}  // namespace

ResourceReport parse_report(std::string_view log) {
  ResourceReport r;
  for_each_line(log, [&](std::string_view line) {
    const auto most = [&](int& field, std::string_view words) { field = std::max(field, number_before(line, words)); };
    // A program of ours holds one kernel; functions that were not inlined report frames of their own.
    most(r.registers, " registers");
    most(r.static_shared_bytes, " bytes smem");
    most(r.stack_bytes, " bytes stack frame");
    most(r.stack_bytes, " bytes cumulative stack size");
    most(r.stack_bytes, " bytes lmem");
    most(r.spill_store_bytes, " bytes spill stores");
    most(r.spill_load_bytes, " bytes spill loads");
    if (has_c75_code(line)) r.warnings.push_back(trimmed(line));
  });
  return r;
}

std::string first_error(std::string_view log) {
  std::string first, error;
  for_each_line(log, [&](std::string_view line) {
    const std::string text = trimmed(line);
    if (text.empty()) return;
    if (first.empty()) first = text;
    const bool says = text.find("error") != std::string::npos || text.find("fatal") != std::string::npos;
    if (error.empty() && says) error = text;
  });
  return error.empty() ? first : error;
}

std::vector<std::string> faults(const ResourceReport& r, const std::string& expect) {
  std::vector<std::string> out;
  const int spills = std::max(r.spill_store_bytes, r.spill_load_bytes);
  if (spills > 0) out.push_back(fmt::format("spills {} bytes", spills));
  if (r.stack_bytes > 0) out.push_back(fmt::format("uses {} bytes of local memory", r.stack_bytes));
  if (!expect.empty() && r.tensor_instructions == 0) out.push_back(fmt::format("has no {} in its SASS", expect));
  for (const std::string& w : r.warnings) out.push_back(w);
  return out;
}

}  // namespace octomoe::jit
