// Tokenizer, chat template, licence, code: what lies beside the weights.
#pragma once

#include <string>

namespace octomoe::checkpoint {

// Copies files and folders from `in` to `out` except hidden ones, config.json, and weights in any format (by suffix).
void copy_side_files(const std::string& in, const std::string& out);

}  // namespace octomoe::checkpoint
