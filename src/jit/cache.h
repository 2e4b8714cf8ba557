// DiskCache: a folder of compiled kernels. One file per key, complete and checksummed or not there; a lock per key
// makes one process compile while the others wait. Any process may be killed at any moment: locks vanish with it, and
// what it had written so far has a temporary name.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "jit/key.h"

namespace octomoe::jit {

class DiskCache {
 public:
  // Nothing is touched before the first call. An empty folder: no cache, every load misses.
  explicit DiskCache(std::string folder);
  ~DiskCache();
  DiskCache(const DiskCache&) = delete;
  DiskCache& operator=(const DiskCache&) = delete;

  // $OCTOMOE_CACHE_DIR, $XDG_CACHE_HOME/octomoe, $HOME/.cache/octomoe; "" if none of them is set.
  static std::string default_folder();

  // The stored bytes. A damaged file is a miss, with a log message.
  std::optional<std::vector<std::byte>> load(const Key& key);

  // Stored bytes, else what `make` returns, stored for the next process. Of all processes that ask for one key at the
  // same time, one runs `make`. Where the folder cannot be written, `make`'s result is returned all the same and one
  // warning is logged in the life of this object. `accept` (may be empty) returns false for bytes that are intact but
  // of no use: they are made again.
  std::vector<std::byte> load_or_make(const Key& key, const std::function<std::vector<std::byte>()>& make,
                                      const std::function<bool(std::span<const std::byte>)>& accept = {});

  const std::string& folder() const { return folder_; }
  std::string file_of(const Key& key) const;

 private:
  class Lock;
  bool prepare();
  void warn_once(const std::string& why);
  void store(const Key& key, std::span<const std::byte> bytes);
  void remove_leftovers();

  std::string folder_;
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace octomoe::jit
