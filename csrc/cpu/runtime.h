// Facts about the process that every instruction set's kernels share.
#pragma once

#include <cstddef>

namespace fastcl {

// True in a child of fork(): the OpenMP pool of the parent does not exist there.
bool in_forked_child();

// Scratch of at least this many bytes, aligned to 64, freed on destruction.
// Out of line, so that no instruction set's file emits an allocator of its own.
class Scratch {
 public:
  explicit Scratch(std::size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <class T> T* as() const { return static_cast<T*>(data_); }

 private:
  void* data_;
};

}  // namespace fastcl
