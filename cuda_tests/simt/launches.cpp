// What kernels were launched with, for the table of kernels: the file that $SIMT_LAUNCHES names gets a line
// for every kernel, size of block and of dynamic shared memory: object file, offset of the kernel in it,
// threads, bytes.

#include <dlfcn.h>

#include <cstdlib>
#include <fstream>
#include <set>
#include <tuple>

#include "simt/simt.h"

namespace simt {

void note_launch(const void* kernel, dim3 block, size_t dynamic_shared_bytes) {
  static const char* file = std::getenv("SIMT_LAUNCHES");
  static std::set<std::tuple<const void*, unsigned, size_t>> noted;
  const unsigned threads = block.x * block.y * block.z;
  Dl_info object{};
  if (!file || !noted.insert({kernel, threads, dynamic_shared_bytes}).second || !dladdr(kernel, &object))
    return;
  std::ofstream(file, std::ios::app) << object.dli_fname << '\t'
                                     << static_cast<const char*>(kernel) -
                                            static_cast<char*>(object.dli_fbase)
                                     << '\t' << threads << '\t' << dynamic_shared_bytes << '\n';
}

}  // namespace simt
