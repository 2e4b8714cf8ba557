// Other programs: run one and read what it says, or keep one and talk to it line by line. No shell.
#pragma once

#include <sys/types.h>

#include <optional>
#include <string>
#include <vector>

namespace octomoe::cli {

// Standard output of the program, empty standard input, standard error dropped. Unset if it cannot be started or ends
// with a code other than 0.
std::optional<std::string> capture(const std::vector<std::string>& command);

// A child with a pipe in both directions; its standard error is kept (its last kilobytes, for messages).
class Child {
 public:
  // Variables are "NAME=value" added to this process's environment. Error(unsupported) if it cannot be started.
  explicit Child(const std::vector<std::string>& command, const std::vector<std::string>& variables = {});
  ~Child();  // closes the pipes; a child that does not end within two seconds is killed
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

  bool write_line(const std::string& line);                // false: the child has gone
  std::optional<std::string> read_line(double timeout_s);  // unset: end of file or timeout
  bool timed_out() const { return timed_out_; }
  std::string error_text() const;  // the last line of its standard error
  int wait();                      // exit code, 128 + signal

 private:
  pid_t pid_ = -1;
  int in_ = -1, out_ = -1, err_ = -1;
  std::string buffer_;
  bool timed_out_ = false, waited_ = false;
  int code_ = 0;
};

// The Python to use: $OCTOMOE_PYTHON, $VIRTUAL_ENV, .venv of this folder or of the source tree, python3. "" if none.
std::string find_python();
// For children of find_python(): makes the package of the source tree importable, when the command runs from there.
std::vector<std::string> python_environment();
// What find_python looks at, for messages.
inline constexpr const char* kPythonSearch =
    "$OCTOMOE_PYTHON, $VIRTUAL_ENV/bin/python, .venv/bin/python, python3 of $PATH";

}  // namespace octomoe::cli
