// Which sources the kernels were built from; a file of its own, so that a change of them compiles
// this one again and not the module.
namespace deqcore {

extern const char kSources[];
const char kSources[] = DEQCORE_SOURCES;

}  // namespace deqcore
