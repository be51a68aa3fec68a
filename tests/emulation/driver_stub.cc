// Stands in for NVIDIA's driver library: says on stdout what reaches it, so that a test can compare. Launches are taken
// to be of merge.cu.
#include <cstdint>
#include <cstdio>
#include <cstring>

#define CALL extern "C" __attribute__((visibility("default"))) int

CALL cuInit(unsigned) { return 0; }
CALL cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}
CALL cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return 0;
}
CALL cuDeviceGetAttribute(int* value, int attribute, int) {
  const int shared_per_block = 97;  // CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN; else per multiprocessor
  *value = (attribute == shared_per_block ? 163 : 164) * 1024;
  return 0;
}
CALL cuLibraryLoadData(void** library, const char* code, void*, void*, unsigned, void*, void*, unsigned) {
  std::printf("load %s\n", code);
  *library = reinterpret_cast<void*>(0x1000);
  return 0;
}
CALL cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  std::printf("kernel %s of %p\n", name, library);
  *kernel = reinterpret_cast<void*>(0x2000 + std::strlen(name));
  return 0;
}
CALL cuKernelSetAttribute(int attribute, int value, void* kernel, int device) {
  std::printf("attribute %d = %d of %p on %d\n", attribute, value, kernel, device);
  return 0;
}
CALL cuLaunchKernel(void* kernel, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned,
                    unsigned shared_bytes, void* stream, void** arguments, void**) {
  std::printf("launch %p grid %u %u %u threads %u ", kernel, x, y, z, threads);
  std::printf("shared %u stream %p\n", shared_bytes, stream);
  std::printf("arguments %p %d %d %p %p\n", *static_cast<void**>(arguments[0]), *static_cast<int*>(arguments[1]),
              *static_cast<int*>(arguments[2]), *static_cast<void**>(arguments[3]), *static_cast<void**>(arguments[4]));
  return x == 3 ? 701 : 0;  // 701: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES
}

CALL cuGetProcAddress_v2(const char* name, void** function, int, std::uint64_t, int* status) {
  const struct {
    const char* name;
    void* function;
  } table[] = {
      {"cuInit", reinterpret_cast<void*>(cuInit)},
      {"cuDriverGetVersion", reinterpret_cast<void*>(cuDriverGetVersion)},
      {"cuDeviceGet", reinterpret_cast<void*>(cuDeviceGet)},
      {"cuDeviceGetAttribute", reinterpret_cast<void*>(cuDeviceGetAttribute)},
      {"cuLibraryLoadData", reinterpret_cast<void*>(cuLibraryLoadData)},
      {"cuLibraryGetKernel", reinterpret_cast<void*>(cuLibraryGetKernel)},
      {"cuKernelSetAttribute", reinterpret_cast<void*>(cuKernelSetAttribute)},
      {"cuLaunchKernel", reinterpret_cast<void*>(cuLaunchKernel)},
  };
  *function = nullptr;
  for (const auto& entry : table)
    if (std::strcmp(name, entry.name) == 0) *function = entry.function;
  if (status) *status = *function ? 0 : 1;
  return 0;
}
CALL cuGetProcAddress(const char* name, void** function, int version, std::uint64_t flags) {
  return cuGetProcAddress_v2(name, function, version, flags, nullptr);
}
