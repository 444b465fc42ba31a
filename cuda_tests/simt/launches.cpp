// Records launch configurations for kernel_table.py. For every distinct combination of kernel, block size and
// dynamic shared memory, a line is appended to the file $SIMT_LAUNCHES: object file, offset of the kernel in
// it, threads, bytes of dynamic shared memory.

#include <dlfcn.h>

#include <cstdlib>
#include <fstream>
#include <set>
#include <tuple>

#include "simt/simt.h"

namespace simt {

void record_launch(const void* kernel, dim3 block, size_t dynamic_shared_bytes) {
  static const char* file = std::getenv("SIMT_LAUNCHES");
  static std::set<std::tuple<const void*, unsigned, size_t>> recorded;
  const unsigned threads = block.x * block.y * block.z;
  Dl_info object{};
  if (!file || !recorded.insert({kernel, threads, dynamic_shared_bytes}).second || !dladdr(kernel, &object))
    return;
  std::ofstream(file, std::ios::app) << object.dli_fname << '\t'
                                     << static_cast<const char*>(kernel) -
                                            static_cast<char*>(object.dli_fbase)
                                     << '\t' << threads << '\t' << dynamic_shared_bytes << '\n';
}

}  // namespace simt
