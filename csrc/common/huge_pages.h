// The first write to a freshly allocated result faults its pages in. With 4 KiB pages the kernel zeroes them
// at about 2 GB/s, which can take longer than computing the result.
#pragma once

#include <cstdint>

namespace statecore {

// Advises the kernel to back [data, data + bytes) with huge pages; does nothing where they are unavailable.
void prefer_huge_pages(void* data, int64_t bytes);

}  // namespace statecore
