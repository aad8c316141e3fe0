// CUDA launchers of the attention stem. Each returns null, or the text of the launch error.
#pragma once

#include "common/attention.h"

namespace kelix::cuda {

const char* rope_store_kv(const RopeStoreKvArgs& args, void* stream);
const char* paged_attention(const PagedAttentionArgs& args, void* stream);

}  // namespace kelix::cuda
