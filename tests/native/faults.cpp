// Disk faults on demand: loaded with LD_PRELOAD, it stands between a program and the C library's calls that change
// files. One rule at a time, armed by tests/faults.py: at the n-th call of a kind whose path holds a text the call
// fails, is cut short, or the process dies or stops. The count is shared by all processes forked after this one, so a
// rule fires once.
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>

namespace {

enum Kind { kAny, kOpen, kWrite, kFileSync, kFolderSync, kRename, kLink, kRemove, kMakeFolder, kOpenToRead };
enum Action { kNothing, kFail, kFailFromHere, kDieBefore, kDieAfter, kHalf, kHalfThenDie, kStop };

struct Rule {
  std::atomic<long> seen;  // calls that match so far
  Kind kind;
  Action action;
  int error;  // errno of kFail and kFailFromHere
  long nth;   // from 1
  char where[PATH_MAX];
  std::atomic<size_t> logged;  // bytes of the log in use
  char log[1 << 20];           // a line per call that matches: kind, path
};

Rule* rule = static_cast<Rule*>(  // of zeros: where = "" marks it as not armed
    mmap(nullptr, sizeof(Rule), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));

// What to do at this call of a kind on a path.
Action decide(Kind kind, const char* path) {
  if (!rule || !*rule->where || !path || !strstr(path, rule->where)) return kNothing;
  if (rule->kind == kAny ? kind == kOpenToRead : rule->kind != kind) return kNothing;
  const long turn = ++rule->seen;
  char line[PATH_MAX + 8];
  const size_t length = snprintf(line, sizeof line, "%d %s\n", kind, path), place = rule->logged.fetch_add(length);
  if (place + length < sizeof rule->log) memcpy(rule->log + place, line, length);
  const bool lasting = rule->action == kFailFromHere || rule->action == kDieBefore;
  return turn == rule->nth || (lasting && turn > rule->nth) ? rule->action : kNothing;
}

Action decide(Kind kind, int file) {
  char link[32], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  const ssize_t length = readlink(link, path, sizeof path - 1);
  path[length < 0 ? 0 : length] = 0;
  return decide(kind, path);
}

void die() { kill(getpid(), SIGKILL), pause(); }

// The call itself with what the rule wants around it; `half` is the call on half of the bytes.
template <class Call, class Half>
auto perform(Action action, Call call, Half half) -> decltype(call()) {
  if (action == kDieBefore) die();
  if (action == kStop) raise(SIGSTOP);
  if (action == kFail || action == kFailFromHere) return errno = rule->error, -1;
  if (action == kHalf) return half();
  if (action == kHalfThenDie) half(), die();
  const auto result = call();
  if (action == kDieAfter) die();
  return result;
}

template <class Call>
auto perform(Action action, Call call) -> decltype(call()) {
  return perform(action, call, call);
}

template <class F>
F* original(const char* name) {
  return reinterpret_cast<F*>(dlsym(RTLD_NEXT, name));
}

int open_at(int folder, const char* path, int flags, mode_t mode) {
  static auto* const call = original<int(int, const char*, int, ...)>("openat");
  const Kind kind = flags & (O_CREAT | O_TRUNC) ? kOpen : kOpenToRead;
  return perform(decide(kind, path), [&] { return call(folder, path, flags, mode); });
}

}  // namespace

extern "C" {

// Forget the count and arm a rule; where = "" only forgets.
void faults_arm(int kind, const char* where, long nth, int action, int error) {
  rule->kind = Kind(kind), rule->action = Action(action), rule->error = error, rule->nth = nth, rule->seen = 0;
  memset(rule->log, 0, rule->logged.exchange(0));
  snprintf(rule->where, sizeof rule->where, "%s", where);
}

const char* faults_log() { return rule->log; }

#define OPEN(name, parameters, folder)                              \
  int name parameters {                                             \
    va_list rest;                                                   \
    va_start(rest, flags);                                          \
    const mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0; \
    va_end(rest);                                                   \
    return open_at(folder, path, flags, mode);                      \
  }
OPEN(open, (const char* path, int flags, ...), AT_FDCWD)
OPEN(open64, (const char* path, int flags, ...), AT_FDCWD)
OPEN(openat, (int folder, const char* path, int flags, ...), folder)
OPEN(openat64, (int folder, const char* path, int flags, ...), folder)

ssize_t write(int file, const void* data, size_t size) {
  static auto* const call = original<ssize_t(int, const void*, size_t)>("write");
  return perform(
      decide(kWrite, file), [&] { return call(file, data, size); }, [&] { return call(file, data, (size + 1) / 2); });
}

int fsync(int file) {
  static auto* const call = original<int(int)>("fsync");
  struct stat about;
  const bool folder = !fstat(file, &about) && S_ISDIR(about.st_mode);
  return perform(decide(folder ? kFolderSync : kFileSync, file), [&] { return call(file); });
}

int rename(const char* from, const char* to) {
  static auto* const call = original<int(const char*, const char*)>("rename");
  return perform(decide(kRename, to), [&] { return call(from, to); });
}

int link(const char* from, const char* to) {
  static auto* const call = original<int(const char*, const char*)>("link");
  return perform(decide(kLink, to), [&] { return call(from, to); });
}

int unlink(const char* path) {
  static auto* const call = original<int(const char*)>("unlink");
  return perform(decide(kRemove, path), [&] { return call(path); });
}

int mkdir(const char* path, mode_t mode) {
  static auto* const call = original<int(const char*, mode_t)>("mkdir");
  return perform(decide(kMakeFolder, path), [&] { return call(path, mode); });
}
}

// Programs that are started with a rule in their environment, and all that they fork, share that rule.
[[maybe_unused]] static const bool from_environment = [] {
  int kind, action, error;
  long nth;
  char where[PATH_MAX];
  const char* text = getenv("FLOWFAST_TEST_RULE");
  if (!text || sscanf(text, "%d %ld %d %d %4000s", &kind, &nth, &action, &error, where) != 5) return false;
  faults_arm(kind, where, nth, action, error);
  return true;
}();
