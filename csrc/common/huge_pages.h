// Large results are memory that is touched for the first time here: in pages of 4 KiB the kernel zeroes it at
// about 2 GB/s, which can take longer than computing what goes there.
#pragma once

#include <cstdint>

namespace statecore {

// Asks for huge pages where [data, data + bytes) spans many of them; without effect where the system has none
// to give.
void prefer_huge_pages(void* data, int64_t bytes);

}  // namespace statecore
