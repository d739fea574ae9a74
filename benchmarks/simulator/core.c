/* One multiprocessor of machine.py: four schedulers, in-order warps, scoreboards, pipes, and a queue for memory.
 *
 * Every completion time is known when an instruction issues, except a barrier's, so time jumps from event to event.
 * Memory is a FIFO of bytes at this multiprocessor's share of the bandwidth; what it left unused in the last `credit`
 * cycles may be taken at once (the other multiprocessors are not in step with this one).
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { PLAIN, LDG, STG, LDGSTS, COMMIT, DEPBAR, BAR, SHARED, HGMMA, WGWAIT, LOCAL };          /* kind */
enum { FMA, HEAVY, ALU, XU, LSU, UNIFORM, TENSOR, BRANCH, PIPES };                             /* pipe; FMA is either half */
enum { W_STALL, W_LONG, W_SHORT, W_BARRIER, W_ASYNC, W_PIPE, W_SELECT, REASONS };              /* why a warp waited */

typedef struct {
    uint8_t stall, wbar, rbar, wait, kind, pipe, depth, in_l1; /* barriers: 7 is none; depth: DEPBAR's count, HGMMA's group */
    int32_t occupy, latency, bytes;                           /* cycles of its pipe; cycles to its result; of a whole warp */
    float l2, dram;                                           /* shares of its bytes that L2 and memory are asked for */
} Ins;

typedef struct {
    double dram_rate, l2_rate, mio_rate, dram_latency, dram_loaded, l2_latency, credit, barrier, start;
} Params;

typedef struct {
    double cycles, issued, dram_bytes, l2_bytes, inflight, pipe[PIPES], mio, waits[REASONS], warp_cycles;
} Out;

#define RING 64
#define WINDOW 1000.
typedef struct {
    const int32_t *trace;
    int64_t length, at;
    int cta, blocked, reason;
    double earliest, last, stalled, arrived;
    double bar[6], pending, group[RING], wg_group[RING];
    uint8_t bar_long[6];
    int groups, wg_groups;
    float missed, share; /* of an access that L2, that memory serves: carried over until it is a whole one */
} Warp;

static double load(double used) { return used > 1 ? 1 : used * used; } /* of memory's bandwidth in the last cycles */
static double maxd(double a, double b) { return a > b ? a : b; }

static void prepare(Warp *w, const Ins *code) { /* when the scoreboards let the next instruction issue, and which one held it */
    const Ins *i = code + w->trace[w->at];
    double until = w->stalled;
    w->reason = W_STALL;
    for (int b = 0; b < 6; b++)
        if ((i->wait >> b & 1) && w->bar[b] > until) until = w->bar[b], w->reason = w->bar_long[b] ? W_LONG : W_SHORT;
    if (i->kind == DEPBAR || i->kind == WGWAIT) {
        int wg = i->kind == WGWAIT, n = (wg ? w->wg_groups : w->groups) - i->depth;
        double done = n > 0 ? (wg ? w->wg_group : w->group)[(n - 1) % RING] : 0;
        if (done > until) until = done, w->reason = wg ? W_ASYNC : W_LONG;
    }
    w->earliest = until;
}

int simulate(const Ins *code, const int32_t *const *traces, const int64_t *lengths, const int32_t *roles, int ctas,
             int resident, int warps, const Params *p, Out *out) {
    int slots = resident * warps, next_cta = 0, running = 0;
    Warp *all = calloc(slots, sizeof(Warp));
    int *waiting = calloc(resident, sizeof(int)), *left = calloc(resident, sizeof(int));
    double try_at[4], free_at[4][PIPES], lite[4], mio = 0, recent = 0, seen = 0, dram = -p->credit, l2 = -64, t = 0, end = 0;
    int last[4] = {-1, -1, -1, -1};
    const double NEVER = 1e18;
    memset(out, 0, sizeof *out);
    memset(free_at, 0, sizeof free_at);
    memset(lite, 0, sizeof lite);
    for (int s = 0; s < 4; s++) try_at[s] = 0;
    for (int i = 0; i < slots; i++) all[i].at = -1;

#define LAUNCH(slot, when)                                                                          \
    do {                                                                                            \
        int role_ = roles[next_cta++];                                                              \
        waiting[slot] = 0, left[slot] = warps, running++;                                           \
        for (int k = 0; k < warps; k++) {                                                           \
            Warp *w_ = all + (slot) * warps + k;                                                    \
            memset(w_, 0, sizeof *w_);                                                              \
            w_->trace = traces[role_], w_->length = lengths[role_], w_->cta = (slot);               \
            w_->stalled = (when), w_->last = (when);                                                \
            prepare(w_, code);                                                                      \
            int s_ = ((slot) * warps + k) & 3;                                                      \
            if (try_at[s_] > (when)) try_at[s_] = (when);                                           \
        }                                                                                           \
    } while (0)

    for (int c = 0; c < resident && next_cta < ctas; c++) LAUNCH(c, 0.0);
    while (running) {
        t = NEVER;
        for (int s = 0; s < 4; s++) t = try_at[s] < t ? try_at[s] : t;
        if (t >= NEVER) { free(all), free(waiting), free(left); return 1; }
        for (int s = 0; s < 4; s++) {
            if (try_at[s] > t) continue;
            int chosen = -1;
            double soonest = NEVER;
            for (int j = s; j < slots; j += 4) { /* the one that issued last, else the oldest */
                Warp *w = all + j;
                if (w->at < 0 || w->blocked) continue;
                const Ins *i = code + w->trace[w->at];
                double pipe = i->pipe == FMA ? (free_at[s][HEAVY] < lite[s] ? free_at[s][HEAVY] : lite[s]) : free_at[s][i->pipe];
                if (i->pipe == LSU) pipe = maxd(pipe, mio - 40);
                double ready = maxd(w->earliest, pipe);
                if (ready <= t) {
                    if (chosen < 0 || j == last[s]) chosen = j;
                } else if (ready < soonest)
                    soonest = ready;
            }
            if (chosen < 0) { try_at[s] = soonest; continue; }
            try_at[s] = t + 1;
            last[s] = chosen;
            Warp *w = all + chosen;
            const Ins *i = code + w->trace[w->at];
            double stall_end = w->stalled < t ? w->stalled : t, held = w->earliest < t ? w->earliest : t;
            out->waits[W_STALL] += stall_end - w->last;
            if (held > stall_end) out->waits[w->reason] += held - stall_end;
            if (t > held) out->waits[W_SELECT] += t - held; /* pipe busy or another warp chosen */
            out->issued++;
            if (i->pipe == FMA) {
                if (lite[s] <= t) lite[s] = t + 2; else free_at[s][HEAVY] = t + 2;
            } else
                free_at[s][i->pipe] = t + i->occupy;
            out->pipe[i->pipe] += i->occupy;
            double done = t + i->latency, read = t + 12;
            if (i->kind == SHARED || i->kind == LDG || i->kind == STG || i->kind == LDGSTS || i->kind == LOCAL) {
                double busy = i->bytes / p->mio_rate;
                busy = busy < 1 ? 1 : busy;
                mio = maxd(mio, t) + busy, out->mio += busy, read = mio + 12;
                if (i->kind == SHARED)
                    done = mio + i->latency;
                else {
                    double latency = i->in_l1 ? i->latency : p->l2_latency, asked = i->kind == STG ? 0 : i->bytes * i->l2;
                    int hit = 0; /* a spilled register that L1 has */
                    l2 = maxd(l2, mio - 64) + asked / p->l2_rate;
                    out->l2_bytes += asked;
                    if (i->kind == LOCAL) {
                        w->missed += i->l2, hit = w->missed < 1;
                        if (!hit) w->missed -= 1;
                    }
                    w->share += i->dram;
                    if (i->dram > 0) {
                        dram = maxd(dram, mio - p->credit) + i->bytes * i->dram / p->dram_rate;
                        recent = recent * exp((seen - mio) / WINDOW) + i->bytes * i->dram, seen = mio;
                        out->dram_bytes += i->bytes * i->dram;
                    }
                    int whole = w->share >= 1;
                    if (whole) w->share -= 1;
                    if (whole) latency = p->dram_latency + p->dram_loaded * load(recent / WINDOW / p->dram_rate);
                    done = maxd(maxd(mio, asked > 0 ? l2 : 0), i->dram > 0 ? dram : 0) + latency;
                    if (hit) done = mio + i->latency;
                    if (i->kind != STG && i->kind != LOCAL) out->inflight += i->bytes * (done - t);
                    if (i->kind == LDGSTS) w->pending = maxd(w->pending, done);
                }
            }
            if (i->kind == COMMIT) {
                double before = w->groups ? w->group[(w->groups - 1) % RING] : 0;
                done = maxd(w->pending, before);
                w->group[w->groups++ % RING] = done;
            }
            if (i->kind == HGMMA) {
                double before = w->wg_groups ? w->wg_group[(w->wg_groups - 1) % RING] : 0;
                if (i->depth) w->wg_group[w->wg_groups++ % RING] = maxd(done, before);
            }
            if (i->wbar < 6 && i->kind != STG && done > w->bar[i->wbar])
                w->bar[i->wbar] = done, w->bar_long[i->wbar] = i->kind == LDG || i->kind == COMMIT || i->kind == LOCAL;
            if (i->rbar < 6 && read > w->bar[i->rbar]) w->bar[i->rbar] = read, w->bar_long[i->rbar] = 0;
            out->warp_cycles += t - w->last;
            w->last = t;
            w->stalled = t + (i->stall ? i->stall : 1);
            int c = w->cta;
            if (++w->at == w->length) {
                w->at = -1;
                end = t;
                if (--left[c] == 0) {
                    running--;
                    if (next_cta < ctas) LAUNCH(c, t + p->start);
                }
                continue;
            }
            prepare(w, code);
            if (i->kind == BAR) {
                w->blocked = 1, w->arrived = t;
                if (++waiting[c] >= left[c]) {
                    waiting[c] = 0;
                    for (int k = 0; k < warps; k++) {
                        Warp *o = all + c * warps + k;
                        if (!o->blocked) continue;
                        o->blocked = 0;
                        double until = maxd(t + p->barrier, o->stalled);
                        out->waits[W_BARRIER] += until - o->stalled > 0 ? until - o->stalled : 0;
                        out->warp_cycles += until - o->last, out->waits[W_STALL] += o->stalled - o->last;
                        o->stalled = o->last = until;
                        prepare(o, code);
                        int q = (c * warps + k) & 3;
                        if (try_at[q] > o->earliest) try_at[q] = maxd(o->earliest, t + (q <= s));
                    }
                }
            }
        }
    }
    out->cycles = maxd(maxd(end, dram), l2);
    free(all), free(waiting), free(left);
    return 0;
}
