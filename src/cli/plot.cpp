#include "cli/plot.h"

#include <fmt/format.h>
#include <unistd.h>

#include <filesystem>

#include "cli/subprocess.h"
#include "octomoe/error.h"

namespace octomoe::cli {

Plot::Plot(const std::string& path) : target_(path, std::filesystem::path(path).extension()), python_(find_python()) {
  if (path == "-") throw Error(ErrorCode::io, "--plot: expected a file name, got '-'");
  if (python_.empty()) {
    throw Error(ErrorCode::unsupported, fmt::format("--plot: no Python found (looked at {})", kPythonSearch));
  }
  environment_ = python_environment();
  Child check({python_, "-c", "import matplotlib, octomoe.plot"}, environment_);
  if (check.wait() != 0) {
    throw Error(
        ErrorCode::unsupported,
        fmt::format("--plot: {} cannot import matplotlib and octomoe.plot: {} (pip install octomoe matplotlib, or "
                    "point OCTOMOE_PYTHON to a Python that has them)",
                    python_, check.error_text()));
  }
}

void Plot::draw(const std::string& bench_json) {
  const std::filesystem::path folder = std::filesystem::temp_directory_path();
  OutputFile json((folder / fmt::format("octomoe-bench-{}.json", ::getpid())).string());
  json.commit(bench_json);
  Child child({python_, "-m", "octomoe.plot", json.path(), target_.temporary_path()}, environment_);
  const int code = child.wait();
  std::error_code ec;
  std::filesystem::remove(json.path(), ec);
  if (code != 0) {
    throw Error(ErrorCode::io, fmt::format("{}: python -m octomoe.plot failed with code {}: {}", target_.path(), code,
                                           child.error_text()));
  }
  target_.rename_only();
}

}  // namespace octomoe::cli
