// The bindings of all operations as one unit: each of these files alone takes as long to compile as
// torch's headers, a second, which are read once here.
#include "bindings/adjoints.cpp"
#include "bindings/cost.cpp"
#include "bindings/envelope.cpp"
#include "bindings/gradients.cpp"
#include "bindings/grid.cpp"
#include "bindings/host.cpp"
#include "bindings/plan.cpp"
#include "bindings/points.cpp"
#include "bindings/problem.cpp"
#include "bindings/solve.cpp"
#include "bindings/tensors.cpp"
