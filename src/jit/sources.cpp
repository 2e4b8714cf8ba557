#include "jit/sources.h"

#include <algorithm>
#include <cctype>
#include <set>

#include "tensor/check.h"

namespace octomoe::jit {
namespace {

bool is_word(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_'; }
bool is_blank(char c) { return c == ' ' || c == '\t' || c == '\v' || c == '\f' || c == '\r'; }

// One pass over C++ source: comments become blanks, and literals become quotes without content, except in the line of a
// directive, which is left as it stands. Newlines stay, so lines keep their numbers.
class Scanner {
 public:
  explicit Scanner(std::string_view text) : text_(text) {}

  template <class OnDirective>  // (std::string_view directive after '#', int line)
  void run(const OnDirective& on_directive) {
    bool line_start = true;
    while (at_ < text_.size()) {
      const char c = text_[at_];
      if (c == '\n') {
        ++line_, ++at_;
        line_start = true;
      } else if (skip_splice() || skip_comment()) {
      } else if (is_blank(c)) {
        ++at_;
      } else if (c == '#' && line_start) {
        ++at_;
        const int line = line_;
        on_directive(directive(), line);
      } else {
        line_start = false;
        if (c == '"') {
          const bool raw = at_ > 0 && text_[at_ - 1] == 'R' && (at_ < 2 || !is_word(text_[at_ - 2]) || raw_prefix());
          raw ? skip_raw_string() : skip_quoted('"');
        } else if (c == '\'' && !(at_ > 0 && is_word(text_[at_ - 1]))) {  // after a word: a digit separator
          skip_quoted('\'');
        } else {
          ++at_;
        }
      }
    }
  }

 private:
  bool starts(std::string_view s) const { return text_.substr(at_).starts_with(s); }
  bool raw_prefix() const {  // u8R"..." and the like
    const std::size_t r = at_ - 1;
    std::size_t begin = r;
    while (begin > 0 && is_word(text_[begin - 1])) --begin;
    const std::string_view prefix = text_.substr(begin, r - begin);
    return prefix == "u8" || prefix == "u" || prefix == "U" || prefix == "L";
  }
  bool skip_splice() {  // backslash newline
    const std::size_t bytes = starts("\\\n") ? 2 : starts("\\\r\n") ? 3 : 0;
    if (bytes == 0) return false;
    at_ += bytes;
    ++line_;
    return true;
  }
  bool skip_comment() {
    if (starts("//")) {
      while (at_ < text_.size() && text_[at_] != '\n') {
        if (!skip_splice()) ++at_;
      }
      return true;
    }
    if (!starts("/*")) return false;
    at_ += 2;
    while (at_ < text_.size() && !starts("*/")) line_ += text_[at_++] == '\n';
    at_ = std::min(at_ + 2, text_.size());
    return true;
  }
  void skip_quoted(char quote) {
    ++at_;
    while (at_ < text_.size() && text_[at_] != quote && text_[at_] != '\n') {
      if (skip_splice()) continue;
      at_ += text_[at_] == '\\' && at_ + 1 < text_.size() && text_[at_ + 1] != '\n' ? 2 : 1;
    }
    if (at_ < text_.size() && text_[at_] == quote) ++at_;
  }
  void skip_raw_string() {
    const std::size_t open = text_.find('(', at_);
    if (open == std::string_view::npos) {
      at_ = text_.size();
      return;
    }
    std::string close(")");
    close.append(text_.substr(at_ + 1, open - at_ - 1)).append("\"");
    const std::size_t end = text_.find(close, open);
    const std::size_t stop = end == std::string_view::npos ? text_.size() : end + close.size();
    for (; at_ < stop; ++at_) line_ += text_[at_] == '\n';
  }
  // The rest of the directive's line with comments blanked; stops before the newline.
  std::string directive() {
    std::string out;
    while (at_ < text_.size() && text_[at_] != '\n') {
      if (skip_splice()) continue;
      if (skip_comment()) {
        out += ' ';
        continue;
      }
      const char c = text_[at_];
      if (c == '"' || c == '<') {  // a name may hold // and /*
        const std::size_t end = text_.find(c == '<' ? '>' : '"', at_ + 1);
        if (end != std::string_view::npos && text_.substr(at_, end - at_).find('\n') == std::string_view::npos) {
          out += text_.substr(at_, end + 1 - at_);
          at_ = end + 1;
          continue;
        }
      }
      out += c;
      ++at_;
    }
    return out;
  }

  std::string_view text_;
  std::size_t at_ = 0;
  int line_ = 1;
};

}  // namespace

std::vector<Include> parse_includes(std::string_view text, std::string_view path) {
  std::vector<Include> out;
  Scanner(text).run([&](const std::string& directive, int line) {
    std::size_t at = 0;
    const auto blanks = [&] {
      while (at < directive.size() && is_blank(directive[at])) ++at;
    };
    blanks();
    constexpr std::string_view kInclude = "include";
    if (directive.compare(at, kInclude.size(), kInclude) != 0) return;
    at += kInclude.size();
    if (at < directive.size() && is_word(directive[at])) return;  // include_next, included...
    blanks();
    const char open = at < directive.size() ? directive[at] : ' ';
    const std::size_t end =
        open == '"' || open == '<' ? directive.find(open == '<' ? '>' : '"', at + 1) : std::string::npos;
    if (end == std::string::npos) {
      fail(ErrorCode::internal, "kernels/{}:{}: expected #include \"FILE\" or <FILE>, got #include {}", path, line,
           directive.substr(std::min(at, directive.size())));
    }
    out.push_back({directive.substr(at + 1, end - at - 1), line, open == '<'});
  });
  return out;
}

SourceSet::SourceSet(std::span<const Source> sources) {
  for (const Source& s : sources) set(std::string(s.path), std::string(s.text));
}

const SourceSet& SourceSet::embedded() {
  static const SourceSet* set = new SourceSet(embedded_kernels());
  return *set;
}

void SourceSet::set(std::string path, std::string text) { files_[std::move(path)] = std::move(text); }

const std::string* SourceSet::find(const std::string& path) const {
  const auto it = files_.find(path);
  return it == files_.end() ? nullptr : &it->second;
}

std::vector<const std::pair<const std::string, std::string>*> SourceSet::closure(const std::string& header) const {
  const auto first = files_.find(header);
  if (first == files_.end()) fail(ErrorCode::internal, "kernels/{}: no such embedded kernel source", header);
  std::map<std::string, const std::pair<const std::string, std::string>*> seen{{header, &*first}};
  std::vector<const std::pair<const std::string, std::string>*> open{&*first};
  while (!open.empty()) {
    const auto* file = open.back();
    open.pop_back();
    for (const Include& include : parse_includes(file->second, file->first)) {
      if (seen.contains(include.name)) continue;
      const auto it = files_.find(include.name);
      if (it == files_.end() && include.system) continue;
      if (it == files_.end()) {
        fail(ErrorCode::internal, "kernels/{}:{}: includes \"{}\", which is not a file below kernels/", file->first,
             include.line, include.name);
      }
      seen.emplace(include.name, &*it);
      open.push_back(&*it);
    }
  }
  std::vector<const std::pair<const std::string, std::string>*> out;
  for (const auto& [name, file] : seen) out.push_back(file);
  return out;
}

}  // namespace octomoe::jit
