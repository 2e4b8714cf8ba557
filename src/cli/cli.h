// The command's frame: how a subcommand is added, and which errors end it with which exit code.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <string>

#include "cli/usage_error.h"

namespace octomoe::cli {

inline constexpr int kOk = 0, kFailure = 1, kUsage = 2;  // exit codes

// What the chosen subcommand does once the whole command line has been accepted; returns the exit code.
using Action = std::function<int()>;

void add_doctor(CLI::App& app, Action& action);
void add_run(CLI::App& app, Action& action);
void add_quantize(CLI::App& app, Action& action);
void add_bench(CLI::App& app, Action& action);
void add_tune(CLI::App& app, Action& action);
void add_pack(CLI::App& app, Action& action);

}  // namespace octomoe::cli
