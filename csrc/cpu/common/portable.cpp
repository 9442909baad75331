// What this library would otherwise take from a newer C or C++ library than manylinux_2_28 has.
//
// The headers of a newer compiler refer to symbols that glibc 2.28 and GCC 8's libstdc++ lack. Each
// of them is defined here, with the same meaning, so that one build runs on every Linux from 2018
// on. tests/test_wheel.py checks the versions of all symbols that are left.
#include <new>
#include <sstream>

#if defined(__linux__) && defined(__GLIBCXX__)

// GLIBC_2.32, of shared_ptr: whether it may count without atomic operations. It never does.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;

// GLIBCXX_3.4.26, of streams that begin empty.
template std::basic_stringstream<char>::basic_stringstream();
template std::basic_ostringstream<char>::basic_ostringstream();

// GLIBCXX_3.4.29, of new T[n].
namespace std {
void __throw_bad_array_new_length() { throw std::bad_array_new_length(); }
}  // namespace std

#if defined(__GLIBC__) && defined(__x86_64__)
// GLIBC_2.34, where it moved from libdl to libc, which still has the old version too.
extern "C" void* dlsym_of_2_2_5(void*, const char*);
__asm__(".symver dlsym_of_2_2_5, dlsym@GLIBC_2.2.5");
extern "C" __attribute__((visibility("hidden"))) void* dlsym(void* handle, const char* name) {
  return dlsym_of_2_2_5(handle, name);
}
#endif

#endif
