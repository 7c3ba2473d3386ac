// GPT-2, forward and backward, in C11 and its standard library (POSIX for mmap and the clock).
//
//     gpt2 loss     model.safetensors tokens.bin [--block=N] [--batch=N] [--steps=N] [--logits=FILE]
//     gpt2 generate model.safetensors tokens.bin [--prompt=N] [--count=N]
//     gpt2 train    model.safetensors tokens.bin [--block=N] [--batch=N] [--steps=N] [--learning_rate=X]
//                                                [--gradients=FILE] [--out=FILE]
//
// It reads a model.safetensors of Hugging Face for any size of GPT-2 (Radford et al. 2019), with its own parser, and
// tokens as raw little-endian uint16. `make reference` builds it; with -fopenmp it uses all cores. NOTES.md in this
// folder derives each backward pass.
//
// `f` writes y; `f_backward` takes dy, the gradient of the loss with respect to y, writes dx, and *adds* the
// gradients of the weights. layer_norm_backward adds to dx, because dx also has the gradient of the residual
// connection. All numbers are float32, and matrices are row-major.
//
// Shapes: B batch, T time (tokens), C width, H heads, D = C / H, V vocabulary, N = B T. The weights of linear layers
// are (in, out), as in GPT-2's files.

#define _POSIX_C_SOURCE 200809L
#include <fcntl.h>
#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#define PARALLEL _Pragma("omp parallel")
#define SHARED_FOR _Pragma("omp for schedule(dynamic)")
#define PARALLEL_FOR _Pragma("omp parallel for")
#else
#define PARALLEL
#define SHARED_FOR
#define PARALLEL_FOR
#endif

static const float EPS = 1e-5f;  // added to the variance in a layer norm

_Noreturn static void fail(const char *format, ...) {
    va_list values;
    va_start(values, format);
    fputs("gpt2: ", stderr);
    vfprintf(stderr, format, values);
    fputc('\n', stderr);
    va_end(values);
    exit(1);
}

static void *room(size_t count, size_t size) {  // zeros, aligned for vectors
    if (size && count > (SIZE_MAX - 63) / size) fail("%zu numbers do not fit in memory", count);
    size_t bytes = (count * size + 63) / 64 * 64;
    void *memory = aligned_alloc(64, bytes ? bytes : 64);
    if (!memory) fail("no memory for %zu MB", bytes >> 20);
    return memset(memory, 0, bytes ? bytes : 64);
}

static size_t least(size_t a, size_t b) { return a < b ? a : b; }

static float *floats(size_t count) { return room(count, sizeof(float)); }

// safetensors: eight bytes (the length of the header), the header (JSON), the numbers. The header is untrusted:
// every value is checked before it is used, and nothing is read past its end.

enum { MOST_DIMS = 8, LONGEST_HEADER = 100000000 };

typedef struct {
    const char *name;  // in the header, without quotes; not null-terminated
    size_t length;
    const char *dtype;
    size_t dims, shape[MOST_DIMS], begin, end;  // offsets of the numbers from the end of the header
    bool used;                                  // it belongs to GPT-2
} Tensor;

typedef struct {
    Tensor *tensors;
    size_t count;
    const uint8_t *numbers;
    const char *error;  // what is wrong with the file, or NULL
} Index;

typedef struct {
    const char *at, *end;
    const char *error;
} Reader;

static bool refuse(Reader *r, const char *error) {
    if (!r->error) r->error = error;
    return false;
}

static void skip_space(Reader *r) {
    while (r->at < r->end && (*r->at == ' ' || *r->at == '\n' || *r->at == '\r' || *r->at == '\t')) r->at++;
}

static bool next_is(Reader *r, char c) {  // consumes c if it comes next
    skip_space(r);
    if (r->at == r->end || *r->at != c) return false;
    r->at++;
    return true;
}

static bool expect(Reader *r, char c) { return next_is(r, c) || refuse(r, "its header is not the JSON that it should be"); }

static bool read_string(Reader *r, const char **start, size_t *length) {
    if (!expect(r, '"')) return false;
    *start = r->at;
    while (r->at < r->end && *r->at != '"') {
        if ((unsigned char)*r->at < 0x20) return refuse(r, "a name in its header holds a control character");
        if (*r->at == '\\' && ++r->at == r->end) break;  // an escaped quote does not end the name
        r->at++;
    }
    if (r->at == r->end) return refuse(r, "its header ends inside a name");
    *length = (size_t)(r->at++ - *start);
    return true;
}

static bool read_size(Reader *r, size_t *value) {
    skip_space(r);
    if (r->at == r->end || *r->at < '0' || *r->at > '9') return refuse(r, "its header lacks a number where one belongs");
    for (*value = 0; r->at < r->end && *r->at >= '0' && *r->at <= '9'; r->at++) {
        size_t digit = (size_t)(*r->at - '0');
        if (*value > (SIZE_MAX - digit) / 10) return refuse(r, "a number in its header is too large");
        *value = *value * 10 + digit;
    }
    return true;
}

static bool same(const char *text, size_t length, const char *word) {
    return strlen(word) == length && !memcmp(text, word, length);
}

static bool read_sizes(Reader *r, size_t *values, size_t most, size_t *count) {
    if (!expect(r, '[')) return false;
    *count = 0;
    if (next_is(r, ']')) return true;
    do {
        if (*count == most) return refuse(r, "a list in its header is too long");
        if (!read_size(r, &values[(*count)++])) return false;
    } while (next_is(r, ','));
    return expect(r, ']');
}

static const struct { const char *name; size_t size; } DTYPES[] = {
    {"F32", 4}, {"F16", 2}, {"BF16", 2}, {"F64", 8}, {"BOOL", 1}, {"U8", 1}, {"I8", 1}, {"F8_E4M3", 1},
    {"F8_E5M2", 1}, {"U16", 2}, {"I16", 2}, {"U32", 4}, {"I32", 4}, {"U64", 8}, {"I64", 8},
};

static bool read_tensor(Reader *r, Tensor *tensor, size_t available) {
    size_t count, offsets[2], size = 0, seen = 0;
    if (!expect(r, '{')) return false;
    do {
        const char *key, *value;
        size_t length, long_;
        if (!read_string(r, &key, &length) || !expect(r, ':')) return false;
        if (same(key, length, "dtype") && !(seen & 1)) {
            seen |= 1;
            if (!read_string(r, &value, &long_)) return false;
            for (size_t i = 0; i < sizeof DTYPES / sizeof *DTYPES; i++)
                if (same(value, long_, DTYPES[i].name)) tensor->dtype = DTYPES[i].name, size = DTYPES[i].size;
            if (!size) return refuse(r, "it holds numbers of an unknown dtype");
        } else if (same(key, length, "shape") && !(seen & 2)) {
            seen |= 2;
            if (!read_sizes(r, tensor->shape, MOST_DIMS, &tensor->dims)) return false;
        } else if (same(key, length, "data_offsets") && !(seen & 4)) {
            seen |= 4;
            if (!read_sizes(r, offsets, 2, &count)) return false;
            if (count != 2) return refuse(r, "a tensor's data_offsets are not two numbers");
        } else {
            return refuse(r, "a tensor in its header says something twice, or something unknown");
        }
    } while (next_is(r, ','));
    if (!expect(r, '}')) return false;
    if (seen != 7) return refuse(r, "a tensor in its header lacks its dtype, shape or data_offsets");
    tensor->begin = offsets[0], tensor->end = offsets[1];
    if (tensor->begin > tensor->end || tensor->end > available)
        return refuse(r, "a tensor lies outside of it: the file is cut short, or its header wrong");
    for (size_t i = 0; i < tensor->dims; i++) {
        if (tensor->shape[i] && size > SIZE_MAX / tensor->shape[i]) return refuse(r, "a tensor's shape is too large");
        size *= tensor->shape[i];
    }
    if (size != tensor->end - tensor->begin) return refuse(r, "a tensor's shape is not as large as its numbers are");
    return true;
}

static int by_place(const void *a, const void *b) {
    const Tensor *x = a, *y = b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    return x->end < y->end ? -1 : x->end > y->end;
}

static int by_name(const void *a, const void *b) {
    const Tensor *x = a, *y = b;
    int order = memcmp(x->name, y->name, x->length < y->length ? x->length : y->length);
    return order ? order : x->length < y->length ? -1 : x->length > y->length;
}

static Index refused(Index index, const char *error) {
    free(index.tensors);
    return (Index){.error = error};
}

// The tensors of a file of `size` bytes, sorted by name. They must fill the file without gap or overlap. The caller
// frees `tensors`.
static Index read_index(const uint8_t *file, size_t size) {
    Index index = {0};
    uint64_t length = 0;
    if (size < 8) return refused(index, "it is too short to be one");
    for (int i = 0; i < 8; i++) length |= (uint64_t)file[i] << (8 * i);
    if (length > LONGEST_HEADER) return refused(index, "its header would be longer than 100 MB");
    if (length > size - 8) return refused(index, "it ends within its header: it is cut short");
    Reader r = {(const char *)file + 8, (const char *)file + 8 + length, NULL};
    index.numbers = file + 8 + length;
    size_t available = size - 8 - (size_t)length, allocated = 0;
    expect(&r, '{');
    bool more = !r.error && !next_is(&r, '}');
    while (more) {
        const char *name, *ignored;
        size_t name_length, ignored_length;
        if (!read_string(&r, &name, &name_length) || !expect(&r, ':')) break;
        if (same(name, name_length, "__metadata__")) {  // an object of strings
            expect(&r, '{');
            for (bool inside = !r.error && !next_is(&r, '}'); inside;) {
                if (!read_string(&r, &ignored, &ignored_length) || !expect(&r, ':')) break;
                if (!read_string(&r, &ignored, &ignored_length)) break;
                inside = next_is(&r, ',');
                if (!inside) expect(&r, '}');
            }
        } else {
            if (index.count == allocated) {
                allocated = allocated ? 2 * allocated : 64;
                Tensor *larger = realloc(index.tensors, allocated * sizeof *larger);
                if (!larger) return refused(index, "there is no memory for its header");
                index.tensors = larger;
            }
            index.tensors[index.count] = (Tensor){.name = name, .length = name_length};
            if (!read_tensor(&r, &index.tensors[index.count], available)) break;
            index.count++;
        }
        if (r.error) break;
        more = next_is(&r, ',');
        if (!more) expect(&r, '}');
    }
    skip_space(&r);
    if (!r.error && r.at != r.end) refuse(&r, "something follows the JSON in its header");
    if (r.error) return refused(index, r.error);
    if (!index.count) return refused(index, "it holds no tensors");
    qsort(index.tensors, index.count, sizeof *index.tensors, by_place);
    size_t filled = 0;
    for (size_t i = 0; i < index.count; i++) {
        if (index.tensors[i].begin < filled) return refused(index, "two of its tensors overlap");
        if (index.tensors[i].begin > filled) return refused(index, "there is a gap between two of its tensors");
        filled = index.tensors[i].end;
    }
    if (filled != available) return refused(index, "it is longer than its header says");
    qsort(index.tensors, index.count, sizeof *index.tensors, by_name);
    for (size_t i = 1; i < index.count; i++)
        if (!by_name(&index.tensors[i - 1], &index.tensors[i])) return refused(index, "it names a tensor twice");
    return index;
}

#ifdef FUZZ  // clang -fsanitize=fuzzer,address,undefined -DFUZZ: reads arbitrary bytes as a file
int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    Index index = read_index(bytes, size);
    unsigned sum = 0;  // read every byte that the index refers to
    for (size_t i = 0; i < index.count; i++) {
        for (size_t k = 0; k < index.tensors[i].length; k++) sum += (unsigned char)index.tensors[i].name[k];
        for (size_t k = index.tensors[i].begin; k < index.tensors[i].end; k++) sum += index.numbers[k];
    }
    free(index.tensors);
    return sum == 0xffffffffu;
}
#endif

// The weights: one block of memory, and a pointer to each tensor in it. The gradients and the two running means of
// AdamW have the same layout.

typedef struct { size_t V, block, C, H, L; } Shape;  // vocabulary, longest context, width, heads, layers

enum { LN_1, LN_1_BIAS, ATTN, ATTN_BIAS, PROJ, PROJ_BIAS, LN_2, LN_2_BIAS, FC, FC_BIAS, OUT, OUT_BIAS, PARTS };
static const struct { const char *name; size_t rows, columns; } PART[PARTS] = {  // in multiples of C; rows 0: a vector
    {"ln_1.weight", 0, 1}, {"ln_1.bias", 0, 1}, {"attn.c_attn.weight", 1, 3}, {"attn.c_attn.bias", 0, 3},
    {"attn.c_proj.weight", 1, 1}, {"attn.c_proj.bias", 0, 1}, {"ln_2.weight", 0, 1}, {"ln_2.bias", 0, 1},
    {"mlp.c_fc.weight", 1, 4}, {"mlp.c_fc.bias", 0, 4}, {"mlp.c_proj.weight", 4, 1}, {"mlp.c_proj.bias", 0, 1},
};
enum { WTE, WPE, LN_F, LN_F_BIAS, LAYERS };  // followed by the tensors of layer 0, layer 1, …

typedef struct { char name[64]; size_t rows, columns; } Kind;  // a tensor's name and shape; rows 0: (columns,)

static size_t tensors_of(Shape s) { return LAYERS + s.L * PARTS; }

static Kind kind_of(Shape s, size_t i) {
    Kind kind = {.columns = s.C};
    if (i >= LAYERS) {
        size_t part = (i - LAYERS) % PARTS;
        snprintf(kind.name, sizeof kind.name, "h.%zu.%s", (i - LAYERS) / PARTS, PART[part].name);
        kind.rows = PART[part].rows * s.C, kind.columns = PART[part].columns * s.C;
        return kind;
    }
    static const char *names[] = {"wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"};
    snprintf(kind.name, sizeof kind.name, "%s", names[i]);
    kind.rows = i == WTE ? s.V : i == WPE ? s.block : 0;
    return kind;
}

static size_t count_of(Kind kind) { return (kind.rows ? kind.rows : 1) * kind.columns; }

typedef struct { float *memory, **at; size_t count; } Weights;

static Weights make_weights(Shape s) {
    Weights w = {.at = room(tensors_of(s), sizeof(float *))};
    for (size_t i = 0; i < tensors_of(s); i++) w.count += count_of(kind_of(s, i));
    w.memory = floats(w.count);
    for (size_t i = 0, place = 0; i < tensors_of(s); place += count_of(kind_of(s, i++))) w.at[i] = w.memory + place;
    return w;
}

static void free_weights(Weights w) { free(w.memory), free(w.at); }

static float **layer(Weights w, size_t l) { return w.at + LAYERS + l * PARTS; }

static Tensor *find(Index index, const char *name) {  // with or without the prefix "transformer."
    for (int prefixed = 0; prefixed < 2; prefixed++) {
        char whole[96];
        snprintf(whole, sizeof whole, "%s%s", prefixed ? "transformer." : "", name);
        Tensor wanted = {.name = whole, .length = strlen(whole)};
        Tensor *found = bsearch(&wanted, index.tensors, index.count, sizeof wanted, by_name);
        if (found) return found;
    }
    return NULL;
}

static const Tensor *table(Index index, const char *path, const char *name) {
    const Tensor *tensor = find(index, name);
    if (!tensor || tensor->dims != 2 || !tensor->shape[0] || !tensor->shape[1])
        fail("%s holds no GPT-2: there is no matrix %s in it", path, name);
    return tensor;
}

// Find a tensor of GPT-2, and check its dtype and shape.
static Tensor *checked(Index index, const char *path, Kind kind) {
    Tensor *tensor = find(index, kind.name);
    if (!tensor) fail("%s holds no GPT-2: %s is missing", path, kind.name);
    if (strcmp(tensor->dtype, "F32")) fail("%s keeps %s as %s: F32 is needed", path, kind.name, tensor->dtype);
    bool fits = kind.rows ? tensor->dims == 2 && tensor->shape[0] == kind.rows && tensor->shape[1] == kind.columns
                          : tensor->dims == 1 && tensor->shape[0] == kind.columns;
    if (!fits) fail("%s: %s has not the shape of a GPT-2 that is this wide", path, kind.name);
    tensor->used = true;
    return tensor;
}

static bool ends_in(Tensor tensor, const char *end) {
    size_t length = strlen(end);
    return tensor.length >= length && !memcmp(tensor.name + tensor.length - length, end, length);
}

static Weights load(const char *path, Shape *s, size_t heads) {
    int file = open(path, O_RDONLY);
    struct stat about;
    if (file < 0 || fstat(file, &about) || !S_ISREG(about.st_mode)) fail("%s cannot be read", path);
    size_t size = (size_t)about.st_size;
    const uint8_t *bytes = size ? mmap(NULL, size, PROT_READ, MAP_PRIVATE, file, 0) : NULL;
    close(file);
    if (bytes == MAP_FAILED) fail("%s cannot be mapped into memory", path);
    Index index = read_index(bytes, size);
    if (index.error) fail("%s is no safetensors file that can be read: %s", path, index.error);

    const Tensor *wte = table(index, path, "wte.weight"), *wpe = table(index, path, "wpe.weight");
    *s = (Shape){.V = wte->shape[0], .C = wte->shape[1], .block = wpe->shape[0]};
    s->H = heads ? heads : s->C < 64 ? 1 : s->C / 64;  // the heads of every GPT-2 are 64 wide
    if (s->C % s->H) fail("a width of %zu does not go into %zu heads: set --heads=N", s->C, s->H);
    char first[64];
    do snprintf(first, sizeof first, "h.%zu.ln_1.weight", s->L);
    while (find(index, first) && ++s->L);
    if (!s->L) fail("%s holds no GPT-2: there is no layer 0 in it", path);

    // all shapes are checked before any memory is allocated: the total is then at most the size of the file
    for (size_t i = 0; i < tensors_of(*s); i++) checked(index, path, kind_of(*s, i));
    for (size_t i = 0; i < index.count; i++) {
        Tensor extra = index.tensors[i];  // some files also have masks and the output layer
        if (extra.used || ends_in(extra, ".attn.bias") || ends_in(extra, ".attn.masked_bias")) continue;
        if (!ends_in(extra, "lm_head.weight"))
            fail("%s holds what GPT-2 has not: %.*s", path, (int)least(extra.length, 80), extra.name);
    }
    Weights w = make_weights(*s);
    for (size_t i = 0; i < tensors_of(*s); i++) {
        Kind kind = kind_of(*s, i);
        memcpy(w.at[i], index.numbers + checked(index, path, kind)->begin, count_of(kind) * sizeof(float));
    }
    free(index.tensors);
    munmap((void *)bytes, size);
    return w;
}

// A file is written as PATH.part, and renamed when it is complete.
static char *part_of(const char *path) {
    char *part = room(strlen(path) + 6, 1);
    sprintf(part, "%s.part", path);
    return part;
}

// Fail before the training if the file for its result cannot be written.
static void try_writing(const char *path) {
    char *part = part_of(path);
    FILE *file = fopen(part, "wb");
    if (!file || fclose(file) || remove(part)) fail("%s cannot be written", path);
    free(part);
}

// Write all tensors as safetensors.
static void save(const char *path, Shape s, Weights w) {
    size_t n = tensors_of(s), room_left = n * 160 + 64, used = 0, place = 0;
    char *header = room(room_left, 1), *part = part_of(path);
    for (size_t i = 0; i < n; i++) {
        Kind kind = kind_of(s, i);
        char rows[32] = "";
        if (kind.rows) snprintf(rows, sizeof rows, "%zu,", kind.rows);
        size_t bytes = count_of(kind) * sizeof(float);
        used += (size_t)snprintf(header + used, room_left - used,
            "%c\"%s\":{\"dtype\":\"F32\",\"shape\":[%s%zu],\"data_offsets\":[%zu,%zu]}",
            i ? ',' : '{', kind.name, rows, kind.columns, place, place + bytes);
        place += bytes;
    }
    header[used++] = '}';
    while (used % 8) header[used++] = ' ';
    uint8_t length[8];
    for (int i = 0; i < 8; i++) length[i] = (uint8_t)(used >> (8 * i));
    FILE *file = fopen(part, "wb");
    bool whole = file && fwrite(length, 1, 8, file) == 8 && fwrite(header, 1, used, file) == used &&
                 fwrite(w.memory, sizeof(float), w.count, file) == w.count && !fflush(file) && !fsync(fileno(file));
    if (file && fclose(file)) whole = false;
    if (!whole || rename(part, path)) fail("%s cannot be written", path);
    free(header), free(part);
}

// Matrix products: C (M, N) = A (M, K) B (K, N). Blocks of A and B are repacked so that the innermost loop reads them
// sequentially, and has MR x NR sums in registers (Goto & van de Geijn 2008).

#if defined(__AVX512F__)
enum { LANES = 16, MR = 12, NV = 2 };
#elif defined(__AVX__)
enum { LANES = 8, MR = 6, NV = 2 };
#else
enum { LANES = 4, MR = 4, NV = 2 };
#endif
enum { NR = NV * LANES, KC = 768 };
typedef float Lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));

typedef struct { const float *at; size_t row, column; } View;  // strides: to the next row, to the next column

static View rows_of(const float *at, size_t width) { return (View){at, width, 1}; }
static View transposed(const float *at, size_t width) { return (View){at, 1, width}; }

// Pack `count` rows of a view from row i on, columns k to k + depth, into out (depth, width): column by column, with
// 0 for the missing width - count rows.
static void lay_out(View v, size_t i, size_t count, size_t k, size_t depth, size_t width, float *out) {
    const float *from = v.at + i * v.row + k * v.column;
    if (v.row == 1 && count == width) {
        for (size_t d = 0; d < depth; d++) memcpy(out + d * width, from + d * v.column, width * sizeof(float));
        return;
    }
    enum { NEAR = 16 };  // one cache line of numbers of each row, then the next cache line of each row
    for (size_t near = 0; near < depth; near += NEAR)
        for (size_t r = 0; r < width; r++)
            for (size_t d = near; d < least(depth, near + NEAR); d++)
                out[d * width + r] = r < count ? from[r * v.row + d * v.column] : 0.0f;
}

static void tile(size_t depth, const float *a, const float *b, float *c, size_t width, size_t rows, size_t columns,
                 bool adds) {
    Lanes sums[MR][NV] = {0};
    for (size_t k = 0; k < depth; k++, a += MR, b += NR) {
        const Lanes *right = (const Lanes *)b;
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++) sums[i][j] += a[i] * right[j];
    }
    float out[MR][NR];
    memcpy(out, sums, sizeof out);
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < columns; j++) c[i * width + j] = out[i][j] + (adds ? c[i * width + j] : 0.0f);
}

// For few rows of A: B is read once for each row, so packing would not pay.
static void few_rows(size_t M, size_t N, size_t K, View a, View b, float *c, size_t width, bool adds) {
    enum { SHARE = 256 };  // columns
    PARALLEL_FOR
    for (size_t share = 0; share < (N + SHARE - 1) / SHARE; share++) {
        size_t from = share * SHARE, to = least(N, from + SHARE);
        for (size_t i = 0; i < M; i++) {
            float *out = c + i * width;
            if (b.row == 1) {  // columns are contiguous
                for (size_t j = from; j < to; j++) {
                    Lanes sums[4] = {0};
                    const float *column = b.at + j * b.column;
                    size_t k = 0;
                    for (; a.column == 1 && k + 4 * LANES <= K; k += 4 * LANES) {
                        const Lanes *x = (const Lanes *)(a.at + i * a.row + k), *y = (const Lanes *)(column + k);
                        for (int v = 0; v < 4; v++) sums[v] += x[v] * y[v];
                    }
                    Lanes all = sums[0] + sums[1] + sums[2] + sums[3];
                    float sum = 0;
                    for (int v = 0; v < LANES; v++) sum += all[v];
                    for (; k < K; k++) sum += a.at[i * a.row + k * a.column] * column[k];
                    out[j] = sum + (adds ? out[j] : 0.0f);
                }
            } else {
                if (!adds) memset(out + from, 0, (to - from) * sizeof(float));
                size_t k = 0;
                for (; b.column == 1 && k + 4 <= K; k += 4) {  // four rows of B for each pass over out
                    const float *x = a.at + i * a.row + k * a.column, *row = b.at + k * b.row;
                    float x0 = x[0], x1 = x[a.column], x2 = x[2 * a.column], x3 = x[3 * a.column];
                    for (size_t j = from; j < to; j++)
                        out[j] += x0 * row[j] + x1 * row[j + b.row] + x2 * row[j + 2 * b.row] + x3 * row[j + 3 * b.row];
                }
                for (; k < K; k++) {
                    float x = a.at[i * a.row + k * a.column];
                    const float *row = b.at + k * b.row;
                    for (size_t j = from; j < to; j++) out[j] += x * row[j * b.column];
                }
            }
        }
    }
}

// C = A B, or C += A B if `adds`; `width` is the row stride of C.
static void product(size_t M, size_t N, size_t K, View a, View b, float *c, size_t width, bool adds) {
    if (M < 4) {
        few_rows(M, N, K, a, b, c, width, adds);
        return;
    }
    View b_columns = {b.at, b.column, b.row};
    size_t a_panels = (M + MR - 1) / MR, b_panels = (N + NR - 1) / NR;
    bool a_whole = M <= N;  // the smaller factor is packed whole, the other one panel by panel
    float *whole = floats((a_whole ? a_panels * MR : b_panels * NR) * least(K, KC));
    for (size_t k = 0; k < K; k += KC) {
        size_t depth = least(K - k, KC);
        bool on_top = adds || k;
        PARALLEL {
            float *panel = floats((a_whole ? NR : MR) * depth);
            SHARED_FOR
            for (size_t p = 0; p < (a_whole ? a_panels : b_panels); p++) {
                if (a_whole) lay_out(a, p * MR, least(MR, M - p * MR), k, depth, MR, whole + p * MR * depth);
                else lay_out(b_columns, p * NR, least(NR, N - p * NR), k, depth, NR, whole + p * NR * depth);
            }
            SHARED_FOR
            for (size_t p = 0; p < (a_whole ? b_panels : a_panels); p++) {
                if (a_whole) lay_out(b_columns, p * NR, least(NR, N - p * NR), k, depth, NR, panel);
                else lay_out(a, p * MR, least(MR, M - p * MR), k, depth, MR, panel);
                for (size_t q = 0; q < (a_whole ? a_panels : b_panels); q++) {
                    size_t i = a_whole ? q : p, j = a_whole ? p : q;
                    const float *left = a_whole ? whole + q * MR * depth : panel;
                    const float *right = a_whole ? panel : whole + q * NR * depth;
                    tile(depth, left, right, c + i * MR * width + j * NR, width, least(MR, M - i * MR),
                         least(NR, N - j * NR), on_top);
                }
            }
            free(panel);
        }
    }
    free(whole);
}

// Operations, each followed by its backward pass.

// y = x W + b: x (N, I), w (I, O), b (O,) -> y (N, O); or y += if `adds`.
static void linear(float *y, const float *x, const float *w, const float *b, size_t N, size_t I, size_t O, bool adds) {
    PARALLEL_FOR
    for (size_t n = 0; n < N; n++)
        for (size_t o = 0; o < O; o++) y[n * O + o] = b[o] + (adds ? y[n * O + o] : 0.0f);
    product(N, O, I, rows_of(x, I), rows_of(w, O), y, O, true);
}

// out (C,) += Σ_n a (N, C), or Σ_n a b if b is not NULL.
static void sum_rows(float *out, const float *a, const float *b, size_t N, size_t C) {
    enum { SHARE = 64 };
    PARALLEL_FOR
    for (size_t share = 0; share < (C + SHARE - 1) / SHARE; share++)
        for (size_t n = 0; n < N; n++)
            for (size_t c = share * SHARE; c < least(C, (share + 1) * SHARE); c++)
                out[c] += a[n * C + c] * (b ? b[n * C + c] : 1.0f);
}

// dx = dy Wᵀ (N, I),  dW += xᵀ dy (I, O),  db += Σ_n dy (O,).
static void linear_backward(float *dx, float *dw, float *db, const float *dy, const float *x, const float *w, size_t N,
                            size_t I, size_t O) {
    product(N, I, O, rows_of(dy, O), transposed(w, O), dx, I, false);
    product(I, O, N, transposed(x, I), rows_of(dy, O), dw, O, true);
    sum_rows(db, dy, NULL, N, O);
}

// y = g n + b, where n = (x - μ) / σ of each row: x (N, C), g and b (C,) -> y, n (N, C), inverse = 1 / σ (N,).
static void layer_norm(float *y, float *n, float *inverse, const float *x, const float *g, const float *b, size_t N,
                       size_t C) {
    PARALLEL_FOR
    for (size_t t = 0; t < N; t++) {
        const float *row = x + t * C;
        double mean = 0, variance = 0;
        for (size_t c = 0; c < C; c++) mean += row[c];
        mean /= (double)C;
        for (size_t c = 0; c < C; c++) variance += (row[c] - mean) * (row[c] - mean);
        inverse[t] = (float)(1 / sqrt(variance / (double)C + EPS));
        for (size_t c = 0; c < C; c++) {
            n[t * C + c] = (row[c] - (float)mean) * inverse[t];
            y[t * C + c] = n[t * C + c] * g[c] + b[c];
        }
    }
}

// dn = g dy;  dx += (dn - mean(dn) - n mean(n dn)) / σ,  dg += Σ_t dy n,  db += Σ_t dy.
static void layer_norm_backward(float *dx, float *dg, float *db, const float *dy, const float *n, const float *inverse,
                                const float *g, size_t N, size_t C) {
    PARALLEL_FOR
    for (size_t t = 0; t < N; t++) {
        double mean = 0, along = 0;
        for (size_t c = 0; c < C; c++) {
            float dn = dy[t * C + c] * g[c];
            mean += dn, along += dn * n[t * C + c];
        }
        mean /= (double)C, along /= (double)C;
        for (size_t c = 0; c < C; c++) {
            float dn = dy[t * C + c] * g[c];
            dx[t * C + c] += (dn - (float)mean - n[t * C + c] * (float)along) * inverse[t];
        }
    }
    sum_rows(dg, dy, n, N, C);
    sum_rows(db, dy, NULL, N, C);
}

// GPT-2's gelu is x (1 + tanh(u)) / 2 with u = √(2/π) (x + 0.044715 x³) (Hendrycks & Gimpel 2016). Returns
// s = (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)).
static float gelu_gate(float x) {
    return 1.0f / (1.0f + expf(-1.5957691216f * (x + 0.044715f * x * x * x)));
}

static void gelu(float *y, const float *x, size_t count) {
    PARALLEL_FOR
    for (size_t i = 0; i < count; i++) y[i] = x[i] * gelu_gate(x[i]);
}

// dx = dy (s + x s (1 - s) 2u'), where 2u' = 2 √(2/π) (1 + 3 · 0.044715 x²).  In place: dy becomes dx.
static void gelu_backward(float *dy, const float *x, size_t count) {
    PARALLEL_FOR
    for (size_t i = 0; i < count; i++) {
        float s = gelu_gate(x[i]), slope = 1.5957691216f * (1.0f + 0.134145f * x[i] * x[i]);
        dy[i] *= s + x[i] * s * (1.0f - s) * slope;
    }
}

// p_i = exp(z_i) / Σ_j exp(z_j) of the first `count` of `all` elements; the others become 0. In place. The largest z
// is subtracted first. Returns log Σ_j exp(z_j).
static double softmax(float *z, size_t count, size_t all) {
    float largest = -FLT_MAX;
    double total = 0;
    for (size_t i = 0; i < count; i++) largest = z[i] > largest ? z[i] : largest;
    for (size_t i = 0; i < count; i++) total += z[i] = expf(z[i] - largest);
    for (size_t i = 0; i < count; i++) z[i] *= (float)(1 / total);
    memset(z + count, 0, (all - count) * sizeof(float));
    return largest + log(total);
}

// dz = p (dp - Σ_j p_j dp_j), times `scale`. In place: dp becomes dz.
static void softmax_backward(float *dp, const float *p, size_t count, float scale) {
    double shared = 0;
    for (size_t i = 0; i < count; i++) shared += p[i] * dp[i];
    for (size_t i = 0; i < count; i++) dp[i] = p[i] * (dp[i] - (float)shared) * scale;
}

// y = P v, P = softmax(q kᵀ / √D), causal, in each head: qkv (B, S, 3C) -> y (N, C), p (B, H, T, S). The queries
// are the last T of the S positions; a query attends to its own key and earlier ones.
static void attention(float *y, float *p, const float *qkv, size_t B, size_t T, size_t S, size_t C, size_t H) {
    size_t D = C / H, first = S - T;
    float scale = 1.0f / sqrtf((float)D);
    PARALLEL_FOR
    for (size_t bh = 0; bh < B * H; bh++) {
        size_t b = bh / H, h = bh % H;
        const float *q = qkv + (b * S + first) * 3 * C + h * D, *k = qkv + b * S * 3 * C + C + h * D, *v = k + C;
        float *weights = p + bh * T * S;
        product(T, S, D, rows_of(q, 3 * C), transposed(k, 3 * C), weights, S, false);
        for (size_t t = 0; t < T; t++) {
            for (size_t s = 0; s <= first + t; s++) weights[t * S + s] *= scale;
            softmax(weights + t * S, first + t + 1, S);
        }
        product(T, D, S, rows_of(weights, S), rows_of(v, 3 * C), y + b * T * C + h * D, C, false);
    }
}

// dP = dy vᵀ,  dS = softmax'(dP) / √D;  dq = dS k,  dk = dSᵀ q,  dv = Pᵀ dy: dqkv (B, T, 3C).
static void attention_backward(float *dqkv, float *dp, const float *dy, const float *p, const float *qkv, size_t B,
                               size_t T, size_t C, size_t H) {
    size_t D = C / H;
    PARALLEL_FOR
    for (size_t bh = 0; bh < B * H; bh++) {
        size_t b = bh / H, h = bh % H, at = b * T * 3 * C + h * D;
        const float *q = qkv + at, *k = q + C, *v = k + C, *dout = dy + b * T * C + h * D, *weights = p + bh * T * T;
        float *ds = dp + bh * T * T;
        product(T, T, D, rows_of(dout, C), transposed(v, 3 * C), ds, T, false);
        for (size_t t = 0; t < T; t++) {
            softmax_backward(ds + t * T, weights + t * T, t + 1, 1.0f / sqrtf((float)D));
            memset(ds + t * T + t + 1, 0, (T - t - 1) * sizeof(float));
        }
        product(T, D, T, rows_of(ds, T), rows_of(k, 3 * C), dqkv + at, 3 * C, false);
        product(T, D, T, transposed(ds, T), rows_of(q, 3 * C), dqkv + at + C, 3 * C, false);
        product(T, D, T, transposed(weights, T), rows_of(dout, C), dqkv + at + 2 * C, 3 * C, false);
    }
}

// x_n = wte[id_n] + wpe[position]: (N,) -> (N, C), for positions from `start` on.
static void embedding(float *x, const uint16_t *ids, const float *wte, const float *wpe, size_t B, size_t T, size_t start,
                      size_t C) {
    PARALLEL_FOR
    for (size_t n = 0; n < B * T; n++)
        for (size_t c = 0; c < C; c++) x[n * C + c] = wte[ids[n] * C + c] + wpe[(start + n % T) * C + c];
}

// dwte[id_n] += dx_n, once for each occurrence of a token.  dwpe[position] += dx_n.
static void embedding_backward(float *dwte, float *dwpe, const float *dx, const uint16_t *ids, size_t N, size_t T, size_t C) {
    for (size_t n = 0; n < N; n++)
        for (size_t c = 0; c < C; c++) {
            dwte[ids[n] * C + c] += dx[n * C + c];
            dwpe[n % T * C + c] += dx[n * C + c];
        }
}

// The mean of -log p of the targets, in nats: logits (N, V), which become p.
static double cross_entropy(float *logits, const uint16_t *targets, size_t N, size_t V) {
    double *each = room(N, sizeof *each), total = 0;
    PARALLEL_FOR
    for (size_t n = 0; n < N; n++) {
        double chosen = logits[n * V + targets[n]];
        each[n] = softmax(logits + n * V, V, V) - chosen;
    }
    for (size_t n = 0; n < N; n++) total += each[n];
    free(each);
    return total / (double)N;
}

// dlogits = (p - onehot(target)) / N, in place of p.
static void cross_entropy_backward(float *p, const uint16_t *targets, size_t N, size_t V) {
    PARALLEL_FOR
    for (size_t n = 0; n < N; n++) {
        p[n * V + targets[n]] -= 1.0f;
        for (size_t v = 0; v < V; v++) p[n * V + v] /= (float)N;
    }
}

// The model. A `Layer` has the activations that the backward pass, or the following tokens, need.

typedef struct {
    float *x, *a, *n_1, *inverse_1, *qkv, *p, *y;          // (N, C) (N, C) (N, C) (N,) (N, 3C) (B, H, T, S) (N, C)
    float *middle, *m, *n_2, *inverse_2, *wide, *bent;     // (N, C) (N, C) (N, C) (N,) (N, 4C) (N, 4C)
} Layer;

typedef enum { FORGET, KEEP, CONTINUE } Purpose;  // loss only; backward pass follows; KV cache of one row

typedef struct {
    Layer *layers;
    float *x, *f, *n_f, *inverse_f, *logits;  // (N, C) each, (N,), (N, V)
    Purpose purpose;
} Run;

static Run make_run(Shape s, size_t N, size_t T, Purpose purpose) {
    if (N > SIZE_MAX / 64 / (s.V + 4 * s.C + s.H * T)) fail("%zu tokens at once do not fit in memory", N);
    Run run = {.layers = room(s.L, sizeof(Layer)), .purpose = purpose};
    size_t C = s.C;
    for (size_t l = 0; l < s.L; l++) {
        if (l && purpose != KEEP) {  // layers share their memory
            run.layers[l] = run.layers[0];
            if (purpose == CONTINUE) run.layers[l].qkv = floats(N * 3 * C);
            continue;
        }
        run.layers[l] = (Layer){
            .x = floats(N * C), .a = floats(N * C), .n_1 = floats(N * C), .inverse_1 = floats(N),
            .qkv = floats(N * 3 * C), .p = floats(N * s.H * T), .y = floats(N * C), .middle = floats(N * C),
            .m = floats(N * C), .n_2 = floats(N * C), .inverse_2 = floats(N), .wide = floats(N * 4 * C),
            .bent = floats(N * 4 * C),
        };
    }
    run.x = floats(N * C), run.f = floats(N * C), run.n_f = floats(N * C), run.inverse_f = floats(N);
    run.logits = floats((purpose == CONTINUE ? 1 : N) * s.V);
    return run;
}

static void free_run(Shape s, Run run) {
    for (size_t l = 0; l < s.L; l++) {
        Layer r = run.layers[l];
        if (!l || run.purpose != FORGET) free(r.qkv);
        if (l && run.purpose != KEEP) continue;  // all other memory is that of layer 0
        float *own[] = {r.x, r.a, r.n_1, r.inverse_1, r.p, r.y, r.middle, r.m, r.n_2, r.inverse_2, r.wide, r.bent};
        for (size_t i = 0; i < sizeof own / sizeof *own; i++) free(own[i]);
    }
    free(run.layers), free(run.x), free(run.f), free(run.n_f), free(run.inverse_f), free(run.logits);
}

// Ids (B, T) -> f (N, C), the input of the output layer. With purpose CONTINUE, `start` tokens are in the KV cache.
static void forward(Shape s, Weights w, Run *run, const uint16_t *ids, size_t B, size_t T, size_t start) {
    size_t N = B * T, C = s.C;
    float *stream = run->x;
    embedding(stream, ids, w.at[WTE], w.at[WPE], B, T, start, C);
    for (size_t l = 0; l < s.L; l++) {
        Layer r = run->layers[l];
        float **of = layer(w, l);
        memcpy(r.x, stream, N * C * sizeof(float));
        layer_norm(r.a, r.n_1, r.inverse_1, r.x, of[LN_1], of[LN_1_BIAS], N, C);
        linear(r.qkv + start * 3 * C, r.a, of[ATTN], of[ATTN_BIAS], N, C, 3 * C, false);
        attention(r.y, r.p, r.qkv, B, T, start + T, C, s.H);
        linear(stream, r.y, of[PROJ], of[PROJ_BIAS], N, C, C, true);
        memcpy(r.middle, stream, N * C * sizeof(float));
        layer_norm(r.m, r.n_2, r.inverse_2, r.middle, of[LN_2], of[LN_2_BIAS], N, C);
        linear(r.wide, r.m, of[FC], of[FC_BIAS], N, C, 4 * C, false);
        gelu(r.bent, r.wide, N * 4 * C);
        linear(stream, r.bent, of[OUT], of[OUT_BIAS], N, 4 * C, C, true);
    }
    layer_norm(run->f, run->n_f, run->inverse_f, stream, w.at[LN_F], w.at[LN_F_BIAS], N, C);
}

static double loss_of(Shape s, Weights w, Run *run, const uint16_t *ids, const uint16_t *targets, size_t B, size_t T,
                      FILE *logits) {
    forward(s, w, run, ids, B, T, 0);
    product(B * T, s.V, s.C, rows_of(run->f, s.C), transposed(w.at[WTE], s.C), run->logits, s.V, false);
    if (logits && fwrite(run->logits, sizeof(float), B * T * s.V, logits) != B * T * s.V)
        fail("the logits cannot be written");
    return cross_entropy(run->logits, targets, B * T, s.V);
}

// The operations of `loss_of` in reverse order; adds to the gradients g.
static void backward(Shape s, Weights w, Weights g, Run *run, const uint16_t *ids, const uint16_t *targets, size_t B,
                     size_t T) {
    size_t N = B * T, C = s.C;
    float *dx = floats(N * C), *dy = floats(N * C), *dwide = floats(N * 4 * C), *dp = floats(N * s.H * T);
    cross_entropy_backward(run->logits, targets, N, s.V);
    product(N, C, s.V, rows_of(run->logits, s.V), rows_of(w.at[WTE], C), dy, C, false);
    product(s.V, C, N, transposed(run->logits, s.V), rows_of(run->f, C), g.at[WTE], C, true);
    layer_norm_backward(dx, g.at[LN_F], g.at[LN_F_BIAS], dy, run->n_f, run->inverse_f, w.at[LN_F], N, C);
    for (size_t l = s.L; l-- > 0;) {
        Layer r = run->layers[l];
        float **of = layer(w, l), **d = layer(g, l), *dqkv = dwide;
        linear_backward(dwide, d[OUT], d[OUT_BIAS], dx, r.bent, of[OUT], N, 4 * C, C);
        gelu_backward(dwide, r.wide, N * 4 * C);
        linear_backward(dy, d[FC], d[FC_BIAS], dwide, r.m, of[FC], N, C, 4 * C);
        layer_norm_backward(dx, d[LN_2], d[LN_2_BIAS], dy, r.n_2, r.inverse_2, of[LN_2], N, C);
        linear_backward(dy, d[PROJ], d[PROJ_BIAS], dx, r.y, of[PROJ], N, C, C);
        attention_backward(dqkv, dp, dy, r.p, r.qkv, B, T, C, s.H);
        linear_backward(dy, d[ATTN], d[ATTN_BIAS], dqkv, r.a, of[ATTN], N, C, 3 * C);
        layer_norm_backward(dx, d[LN_1], d[LN_1_BIAS], dy, r.n_1, r.inverse_1, of[LN_1], N, C);
    }
    embedding_backward(g.at[WTE], g.at[WPE], dx, ids, N, T, C);
    free(dx), free(dy), free(dwide), free(dp);
}

// AdamW (Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019): w -= lr (m̂ / (√v̂ + ε) + decay w), in place.
// Vectors (biases and norms) do not decay.
static void adamw(Shape s, Weights w, Weights g, Weights m, Weights v, int steps, double rate) {
    const float beta1 = 0.9f, beta2 = 0.95f, decay = 0.1f;
    float step = (float)(rate / (1 - pow(beta1, steps))), unbias = (float)(1 / (1 - pow(beta2, steps)));
    for (size_t i = 0; i < tensors_of(s); i++) {
        Kind kind = kind_of(s, i);
        float keep = kind.rows ? 1.0f - (float)rate * decay : 1.0f, *mi = m.at[i], *vi = v.at[i];
        PARALLEL_FOR
        for (size_t k = 0; k < count_of(kind); k++) {
            float grad = g.at[i][k];
            mi[k] += (grad - mi[k]) * (1.0f - beta1);
            vi[k] += (grad * grad - vi[k]) * (1.0f - beta2);
            w.at[i][k] = w.at[i][k] * keep - step * mi[k] / (sqrtf(vi[k] * unbias) + 1e-8f);
        }
    }
}

// The commands.

typedef struct {
    size_t block, batch, steps, prompt, count, heads;
    double learning_rate;
    const char *logits, *gradients, *out;
} Options;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static uint16_t *read_tokens(const char *path, size_t *count, size_t V) {
    FILE *file = fopen(path, "rb");
    if (!file || fseeko(file, 0, SEEK_END)) fail("%s cannot be read", path);
    off_t size = ftello(file);
    if (size < 0 || size % 2) fail("%s is no file of 16-bit tokens: it has an odd number of bytes", path);
    rewind(file);
    *count = (size_t)size / 2;
    uint16_t *ids = room(*count, 2);
    uint8_t *bytes = room(*count, 2);
    if (fread(bytes, 2, *count, file) != *count) fail("%s cannot be read", path);
    for (size_t i = 0; i < *count; i++) {
        ids[i] = (uint16_t)(bytes[2 * i] | bytes[2 * i + 1] << 8);  // little-endian on every machine
        if (ids[i] >= V) fail("%s holds the token %u, and the model knows %zu", path, ids[i], V);
    }
    free(bytes);
    fclose(file);
    return ids;
}

static void measure(Shape s, Weights w, const uint16_t *ids, size_t count, Options o) {
    size_t windows = (count - 1) / o.block, most = o.steps ? least(windows, o.steps * o.batch) : windows;
    o.batch = least(o.batch, most);
    Run run = make_run(s, o.batch * o.block, o.block, FORGET);
    FILE *logits = o.logits ? fopen(o.logits, "wb") : NULL;
    if (o.logits && !logits) fail("%s cannot be written", o.logits);
    double total = 0;
    for (size_t i = 0; i < most; i += o.batch) {
        size_t rows = least(o.batch, most - i);
        const uint16_t *from = ids + i * o.block;
        total += loss_of(s, w, &run, from, from + 1, rows, o.block, logits) * (double)rows;
    }
    if (logits && fclose(logits)) fail("%s cannot be written", o.logits);
    free_run(s, run);
    printf("loss %.6f  perplexity %.3f\n", total / (double)most, exp(total / (double)most));
}

static void train(Shape s, Weights w, const uint16_t *ids, size_t count, Options o) {
    size_t windows = (count - 1) / o.block, next = 0;
    Weights g = make_weights(s), m = make_weights(s), v = make_weights(s);
    if (o.out) try_writing(o.out);
    if (o.gradients) try_writing(o.gradients);
    Run run = make_run(s, o.batch * o.block, o.block, KEEP);
    uint16_t *batch = room(2 * o.batch * o.block, 2), *targets = batch + o.batch * o.block;
    for (size_t step = 1; step <= o.steps; step++) {
        double begun = now();
        for (size_t b = 0; b < o.batch; b++, next++) {  // consecutive windows, again from the first after the last
            const uint16_t *from = ids + next % windows * o.block;
            memcpy(batch + b * o.block, from, o.block * 2), memcpy(targets + b * o.block, from + 1, o.block * 2);
        }
        double loss = loss_of(s, w, &run, batch, targets, o.batch, o.block, NULL);
        memset(g.memory, 0, g.count * sizeof(float));
        backward(s, w, g, &run, batch, targets, o.batch, o.block);
        double taken = now() - begun;
        if (step == 1 && o.gradients) save(o.gradients, s, g);
        begun = now();
        adamw(s, w, g, m, v, (int)step, o.learning_rate);
        double read = (double)(o.batch * o.block);
        printf("step %4zu  loss %.6f  %.0f tokens/s, %.0f with AdamW\n", step, loss, read / taken,
               read / (taken + now() - begun));
        fflush(stdout);
    }
    if (o.out) save(o.out, s, w);
    free_run(s, run), free(batch), free_weights(g), free_weights(m), free_weights(v);
}

// Greedy generation. With the KV cache, each step computes one token. When the block is full, a new cache is computed
// from the last half block of tokens.
static void generate(Shape s, Weights w, const uint16_t *prompt, Options o) {
    if (s.V > 65536) fail("tokens of 16 bits are 65,536 at most, and the model knows %zu", s.V);
    Run run = make_run(s, s.block, 1, CONTINUE);
    float *p = run.layers[0].p;
    size_t known = o.prompt, length = 0;  // tokens so far, and tokens in the KV cache
    uint16_t *ids = room(known + o.count, 2), *window = ids;
    memcpy(ids, prompt, known * 2);
    if (known > s.block) window += known - s.block;
    double begun = now();
    for (size_t i = 0; i < o.count; i++, known++) {
        if ((size_t)(ids + known - window) > s.block) {
            size_t half = s.block / 2 ? s.block / 2 : 1;
            window = ids + known - half, length = 0;
        }
        size_t fresh = (size_t)(ids + known - window) - length;
        free(p);
        p = floats(s.H * fresh * (length + fresh));
        for (size_t l = 0; l < s.L; l++) run.layers[l].p = p;
        forward(s, w, &run, window + length, 1, fresh, length);
        length += fresh;
        product(1, s.V, s.C, rows_of(run.f + (fresh - 1) * s.C, s.C), transposed(w.at[WTE], s.C), run.logits, s.V, false);
        size_t best = 0;
        for (size_t t = 1; t < s.V; t++) best = run.logits[t] > run.logits[best] ? t : best;
        ids[known] = (uint16_t)best;
        printf(i ? ",%zu" : "%zu", best);
        fflush(stdout);
    }
    putchar('\n');
    fprintf(stderr, "%.1f tokens/s\n", (double)o.count / (now() - begun));
    free_run(s, run), free(ids);
}

static size_t number(const char *name, const char *text, size_t low, size_t high) {
    char *end;
    unsigned long long value = strtoull(text, &end, 10);
    if (*text < '0' || *text > '9' || *end || value < low || value > high)
        fail("--%s=%s: a whole number from %zu to %zu is needed", name, text, low, high);
    return (size_t)value;
}

static const char USAGE[] =
    "usage: gpt2 loss|generate|train model.safetensors tokens.bin [options]\n"
    "  --block=N --batch=N   tokens in a row; rows at a time (train: 64 and 4)\n"
    "  --steps=N             train: steps (20); loss: batches at most (0: all)\n"
    "  --learning_rate=X     train: AdamW's (1e-4)\n"
    "  --prompt=N --count=N  generate: tokens of the file to begin with (8), tokens to write (40)\n"
    "  --heads=N             attention heads, where they are not of 64\n"
    "  --logits=FILE         loss: write them, raw float32\n"
    "  --gradients=FILE      train: write those of the first step, safetensors\n"
    "  --out=FILE            train: write the weights, safetensors";

static Options read_options(int count, char **texts, bool training) {
    Options o = {.batch = 4, .steps = training ? 20 : 0, .prompt = 8, .count = 40,
                 .learning_rate = 1e-4};
    struct { const char *name; size_t *value; size_t low; } sizes[] = {
        {"block", &o.block, 1}, {"batch", &o.batch, 1}, {"steps", &o.steps, 0},
        {"prompt", &o.prompt, 1}, {"count", &o.count, 0}, {"heads", &o.heads, 1},
    };
    struct { const char *name; const char **value; } files[] = {
        {"logits", &o.logits}, {"gradients", &o.gradients}, {"out", &o.out},
    };
    for (int i = 0; i < count; i++) {
        const char *value = strchr(texts[i], '=');
        if (strncmp(texts[i], "--", 2) || !value++) fail("%s is no option\n%s", texts[i], USAGE);
        size_t length = (size_t)(value - 1 - (texts[i] + 2));
        bool known = false;
        for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++)
            if (same(texts[i] + 2, length, sizes[k].name))
                *sizes[k].value = number(sizes[k].name, value, sizes[k].low, 1u << 20), known = true;
        for (size_t k = 0; k < sizeof files / sizeof *files; k++)
            if (same(texts[i] + 2, length, files[k].name)) *files[k].value = value, known = true;
        if (same(texts[i] + 2, length, "learning_rate")) {
            char *end;
            o.learning_rate = strtod(value, &end), known = true;
            if (end == value || *end || !(o.learning_rate >= 0 && o.learning_rate < 1e6))
                fail("%s: a number from 0 on is needed", texts[i]);
        }
        if (!known) fail("%s is no option\n%s", texts[i], USAGE);
    }
    return o;
}

#ifndef FUZZ
int main(int count, char **texts) {
    const char *command = count > 1 ? texts[1] : "";
    bool training = !strcmp(command, "train"), writing = !strcmp(command, "generate");
    if (count < 4 || (!training && !writing && strcmp(command, "loss"))) {
        fprintf(stderr, "%s\n", USAGE);
        return 2;
    }
    Options o = read_options(count - 4, texts + 4, training);
    Shape s;
    Weights w = load(texts[2], &s, o.heads);
    size_t tokens;
    uint16_t *ids = read_tokens(texts[3], &tokens, s.V);
    if (!o.block) o.block = training ? least(64, s.block) : s.block;
    if (o.block > s.block) fail("--block=%zu: the model has a block of %zu", o.block, s.block);
    size_t needed = writing ? o.prompt : o.block + 1;
    if (tokens < needed) fail("%s holds %zu tokens, and %zu are needed", texts[3], tokens, needed);
    if (writing) generate(s, w, ids, o);
    else if (training) train(s, w, ids, tokens, o);
    else measure(s, w, ids, tokens, o);
    free_weights(w), free(ids);
    return 0;
}
#endif
