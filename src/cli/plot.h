// A picture of a bench result, drawn by `python -m octomoe.plot`.
#pragma once

#include <string>
#include <vector>

#include "cli/output_file.h"

namespace octomoe::cli {

class Plot {
 public:
  // Looks for Python and octomoe.plot, and tries the target, before anything is measured. Error says what is missing.
  explicit Plot(const std::string& path);
  void draw(const std::string& bench_json);

 private:
  OutputFile target_;
  std::string python_;
  std::vector<std::string> environment_;
};

}  // namespace octomoe::cli
