// A result file that is complete or not there: written under a temporary name beside the target and renamed. Whether
// that name can be made is tried when the object is, so that a folder without write permission is reported before hours
// of work.
#pragma once

#include <string>

namespace octomoe::cli {

class OutputFile {
 public:
  // Error(io) if `path` cannot be written. "-" is standard output; devices and pipes are written directly.
  explicit OutputFile(std::string path, const std::string& suffix = "");
  ~OutputFile();  // removes the temporary file unless it was renamed
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  void commit(const std::string& content);  // write, sync, rename; Error(io), the old file untouched, if that fails
  void rename_only();                       // somebody else wrote temporary_path()
  const std::string& path() const { return path_; }
  const std::string& temporary_path() const { return temporary_; }

 private:
  std::string path_, target_, temporary_;  // target_: path_ with symbolic links followed
  bool direct_ = false;
};

}  // namespace octomoe::cli
