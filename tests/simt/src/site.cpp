#include "simt/site.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <sstream>
#include <unordered_map>

namespace simt {
namespace {

std::string output_of(const std::string& command) {
  std::string text;
  if (FILE* pipe = popen(command.c_str(), "r")) {
    char chunk[512];
    while (size_t count = fread(chunk, 1, sizeof chunk, pipe)) text.append(chunk, count);
    pclose(pipe);
  }
  return text;
}

std::string hex(uintptr_t value) {
  std::ostringstream text;
  text << "0x" << std::hex << value;
  return text.str();
}

// "kelix::cuda::f<float>(Args)" -> "f"
std::string bare_name(std::string name) {
  const size_t end = name.find_first_of("<(");
  name = name.substr(0, end);
  const size_t begin = name.find_last_of(": ");
  return begin == std::string::npos ? name : name.substr(begin + 1);
}

std::string bare_place(const std::string& place) {
  std::string text = place.substr(place.find_last_of('/') + 1);
  return text.substr(0, text.find(' '));  // "(discriminator 3)" follows
}

// Lines of function and place in turn, from the innermost call out.
std::istringstream addr2line(uintptr_t address) {
  Dl_info info{};
  if (dladdr(reinterpret_cast<void*>(address), &info) == 0) return {};
  const uintptr_t offset = address - reinterpret_cast<uintptr_t>(info.dli_fbase);
  return std::istringstream(
      output_of("addr2line -Cfie '" + std::string(info.dli_fname) + "' " + hex(offset)));
}

std::string resolve(const void* return_address) {
  // The call lies before the address it returns to.
  const uintptr_t address = reinterpret_cast<uintptr_t>(return_address) - 1;
  std::istringstream lines = addr2line(address);
  std::string text;
  std::string name;
  std::string place;
  while (std::getline(lines, name) && std::getline(lines, place)) {
    const std::string file = bare_place(place);
    if (file[0] == '?') return hex(address);
    if (place.find("/include/simt/") != std::string::npos) continue;  // the harness itself
    if (place.find("/bits/") != std::string::npos) break;  // std::function, which calls the kernel
    if (!text.empty()) text += " in ";
    text += bare_name(name) + " (" + file + ")";
  }
  return text.empty() ? hex(address) : text;
}

}  // namespace

std::string function_name(const void* address) {
  std::istringstream lines = addr2line(reinterpret_cast<uintptr_t>(address));
  std::string name;
  std::getline(lines, name);
  return bare_name(name);
}

const std::string& source_of(const void* return_address) {
  static std::unordered_map<const void*, std::string> known;
  auto found = known.find(return_address);
  if (found == known.end()) found = known.emplace(return_address, resolve(return_address)).first;
  return found->second;
}

}  // namespace simt
