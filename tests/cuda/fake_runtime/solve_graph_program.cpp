// Runs csrc/cuda/solve_graph.cu against the runtime beside it: one line of results for each case.
#include <cstdio>
#include <exception>
#include <string>

#include "../../../csrc/cuda/solve_graph.cu"

namespace {

std::string said;
int32_t remaining = 0, taken = 0;
int lasting = 0;  // steps until no row remains

Graph part(char name, bool decides) {
  Graph graph;
  auto node = std::make_shared<Node>();
  node->run = [name, decides] {
    said += name;
    if (name == 'f') remaining = lasting;
    if (decides) --remaining;
  };
  graph.nodes.push_back(std::move(node));
  return graph;
}

uintptr_t number(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

void run(const char* name, bool with_last, bool on_device, int64_t max_steps,
         std::initializer_list<int> solves) {
  Graph first = part('f', false), body = part('b', true), last = part('l', false);
  said.clear();
  try {
    deqcore::cuda::SolveGraph solve(number(&first), number(&body), with_last ? number(&last) : 0,
                                    on_device ? number(&remaining) : 0, number(&taken), max_steps);
    for (const int steps : solves) {
      lasting = steps;
      solve.launch(0);
      said += ' ';
    }
  } catch (const std::exception& error) {
    said += std::string("error: ") + error.what();
  }
  std::printf("%s|%s|alive %d, taken %d\n", name, said.c_str(), fake::alive, taken);
}

}  // namespace

int main() {
  run("early exit", true, true, 50, {3, 1, 5});
  run("no last part", false, true, 50, {2});
  run("nothing remains", true, true, 50, {0});
  run("a row that never ends", true, true, 4, {1000, 2, 1000});
  run("fixed length", true, false, 3, {1, 9});
  for (int call = 0; call < 9; ++call) {
    fake::calls = 0;
    fake::fail_at = call;
    run("call fails", true, true, 50, {1});
  }
  fake::fail_at = -1;
  fake::driver = 12030;
  std::printf("%s\n", deqcore::cuda::SolveGraph::why_not_conditional());
  run("old driver", true, true, 50, {1});
  run("old driver, fixed length", true, false, 2, {1});
}
