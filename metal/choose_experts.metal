// The experts that a token is sent to: the CHOSEN largest of a router's numbers, and what each counts.
// Used for decode steps of a mixture, in the place of a softmax, a sort, and what gathers and divides.
//
// Arrays
//   logits   (EXPERTS,) T
//   indices  (CHOSEN,) uint32: the largest number's first; of equal ones the lower index; NaN is the largest
//   weights  (CHOSEN,) float32: softmax of the chosen numbers, or with OF_ALL of all numbers
// Constants: T, EXPERTS, CHOSEN, OF_ALL (0 or 1), THREADS. Grid: one threadgroup of THREADS.

struct ChooseMemory {
  float logit[EXPERTS];
  float power[EXPERTS];
  uint chosen[CHOSEN];
};

METAL_FUNC void choose_experts(const device T* logits, device uint32_t* indices, device float* weights,
                               threadgroup ChooseMemory& memory, const Thread me) {
  for (uint e = me.index; e < uint(EXPERTS); e += THREADS) {
    memory.logit[e] = float(logits[e]);
  }
  for (uint rank = me.index; rank < uint(CHOSEN); rank += THREADS) {
    memory.chosen[rank] = rank;  // an expert that there is, also where a compiler knows no NaN
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint e = me.index; e < uint(EXPERTS); e += THREADS) {
    const float mine = memory.logit[e];
    uint rank = 0;
    for (uint o = 0; o < uint(EXPERTS); ++o) {
      const float other = memory.logit[o];
      const bool larger = other > mine || (other != other && mine == mine);
      const bool equal = other == mine || (other != other && mine != mine);
      rank += larger || (equal && o < e) ? 1 : 0;
    }
    if (rank < uint(CHOSEN)) {
      memory.chosen[rank] = e;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const float most = memory.logit[memory.chosen[0]];
  for (uint e = me.index; e < uint(EXPERTS); e += THREADS) {
    memory.power[e] = exp(memory.logit[e] - most);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint rank = me.index; rank < uint(CHOSEN); rank += THREADS) {
    float sum = 0.0f;
    for (uint i = 0; i < uint(OF_ALL ? EXPERTS : CHOSEN); ++i) {
      sum += memory.power[OF_ALL ? i : memory.chosen[i]];
    }
    indices[rank] = memory.chosen[rank];
    weights[rank] = memory.power[memory.chosen[rank]] / sum;
  }
}
