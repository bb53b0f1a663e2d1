// A step library with the real interface and a toy model, to test the runtime without a compiler.
// The model: a row's token is stored in its KV pages; the next token is a checksum of what the row sees there,
// so a wrong page, row, position or setting changes the text. toy.py holds the same model in numpy.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "layout.h"  // written by toy.py: limits, groups, byte offsets of the state

struct OlMemory {
    const int32_t* tables[2];
    int32_t records;
    const uint8_t* weights;
    uint8_t* workspace;
    uint8_t* state;
    uint8_t* kv[8];
    int32_t kv_pages[8];
};

struct Toy {
    OlMemory m;
    template <class T> T* field(int64_t offset) { return reinterpret_cast<T*>(m.state + offset); }
    int32_t* tile(int g, int copy, int slot, int position) {
        int32_t page = field<int32_t>(AT_pages)[(g * SLOTS + slot) * PAGES + position / 64];
        return reinterpret_cast<int32_t*>(m.kv[g] + ((int64_t(page / 4) * COPIES[g] + copy) * 4 + page % 4) * TILE_BYTES[g]);
    }
    void append(int r);
    int64_t checksum(int r);
    int32_t choose(int r);
    void commit();
    int32_t step();
};

void Toy::append(int r) {
    int slot = field<int32_t>(AT_row_slot)[r], position = field<int32_t>(AT_row_position)[r];
    for (int g = 0; g < GROUPS; g++)
        for (int copy = 0; copy < COPIES[g]; copy++)
            tile(g, copy, slot, position)[position % 64] = field<int32_t>(AT_row_token)[r];
}

int64_t Toy::checksum(int r) {
    int slot = field<int32_t>(AT_row_slot)[r], position = field<int32_t>(AT_row_position)[r];
    int64_t sum = 0;
    for (int g = 0; g < GROUPS; g++) {
        int first = WINDOW[g] && position >= WINDOW[g] ? position - WINDOW[g] + 1 : 0;
        for (int q = first; q <= position; q++)
            sum += (tile(g, COPIES[g] - 1, slot, q)[q % 64] + 1) * int64_t(q % 7 + 1);
    }
    return sum * 7 + position;
}

int32_t Toy::choose(int r) {
    int slot = field<int32_t>(AT_row_slot)[r];
    if (field<int32_t>(AT_row_token)[r] == VOCAB - 1) return -1;
    int64_t x = checksum(r);
    if (field<float>(AT_slot_temperature)[slot] > 0)
        x += int64_t(field<uint64_t>(AT_slot_seed)[slot] % 1000) * 13 + field<uint32_t>(AT_slot_stream)[slot] * 29;
    if (field<float>(AT_slot_penalty)[slot] != 1)
        for (int w = 0; w < SEEN; w++) x += 3 * __builtin_popcount(field<uint32_t>(AT_slot_seen)[slot * SEEN + w]);
    return int32_t(x % (VOCAB - 2));
}

void Toy::commit() {
    int32_t outputs = *field<int32_t>(AT_n_outputs), rows = *field<int32_t>(AT_n_rows), next = 0;
    auto see = [&](int slot, int token) {
        if (token >= 0) field<uint32_t>(AT_slot_seen)[slot * SEEN + token / 32] |= 1u << token % 32;
    };
    for (int r = 0; r < rows; r++) see(field<int32_t>(AT_row_slot)[r], field<int32_t>(AT_row_token)[r]);
    int32_t slots[OUTPUTS], positions[OUTPUTS];
    for (int j = 0; j < outputs; j++) {
        int r = field<int32_t>(AT_output_row)[j];
        slots[j] = field<int32_t>(AT_row_slot)[r], positions[j] = field<int32_t>(AT_row_position)[r];
    }
    for (int j = 0; j < outputs; j++) {
        int slot = slots[j], token = field<int32_t>(AT_output_token)[j], stopped = 0;
        int32_t& count = field<int32_t>(AT_slot_count)[slot];
        field<int32_t>(AT_slot_tokens)[slot * CONTEXT + count++ % CONTEXT] = token;
        see(slot, token);
        for (int i = 0; i < STOPS; i++) stopped |= field<int32_t>(AT_slot_stop)[slot * STOPS + i] == token;
        int finished = token < 0 ? 3 : stopped ? 1 : positions[j] + 2 > field<int32_t>(AT_slot_limit)[slot] ? 2 : 0;
        if ((field<int32_t>(AT_slot_finished)[slot] = finished)) continue;
        field<int32_t>(AT_row_token)[next] = token;
        field<int32_t>(AT_row_slot)[next] = slot;
        field<int32_t>(AT_row_position)[next] = positions[j] + 1;
        field<int32_t>(AT_row_output)[next] = field<int32_t>(AT_output_row)[next] = next;
        next++;
    }
    *field<int32_t>(AT_n_rows) = *field<int32_t>(AT_n_outputs) = next;
}

int32_t Toy::step() {
    int rows = *field<int32_t>(AT_n_rows), outputs = *field<int32_t>(AT_n_outputs);
    for (int r = 0; r < rows; r++) {
        if (field<int32_t>(AT_row_token)[r] == VOCAB - 2) {
            const int32_t fault[8] = {1, 0, 5, 3, 2, 4, 0, 0};
            std::memcpy(field<int32_t>(AT_fault), fault, sizeof fault);
            return 1;
        }
        append(r);
    }
    for (int j = 0; j < outputs; j++) {
        int32_t token = field<int32_t>(AT_output_token)[j] = choose(field<int32_t>(AT_output_row)[j]);
        float* logits = reinterpret_cast<float*>(m.workspace + LOGITS) + int64_t(j) * STRIDE;
        for (int v = 0; v < VOCAB; v++) logits[v] = token < 0 ? NAN : -float((v - token + VOCAB) % VOCAB);
    }
    commit();
    return 0;
}

extern "C" {
int32_t ol_level(void) { return 0; }
void* ol_create(const OlMemory* memory, int32_t workers) { return workers > 0 ? new Toy{*memory} : nullptr; }
int32_t ol_step(void* handle) { return static_cast<Toy*>(handle)->step(); }
int32_t ol_run(void* handle, int32_t steps) {
    Toy* toy = static_cast<Toy*>(handle);
    for (int32_t done = 0; done < steps; done++) {
        if (*toy->field<int32_t>(AT_n_rows) == 0) return done;
        if (int32_t fault = toy->step()) return -fault;
    }
    return steps;
}
void ol_destroy(void* handle) { delete static_cast<Toy*>(handle); }
double ol_read_gbps(const uint8_t* p, uint64_t bytes, void*) {
    double sum = 1;
    for (uint64_t i = 0; i < bytes; i++) sum += p[i];
    return sum;
}
}
