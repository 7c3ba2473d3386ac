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

static void *allocate(size_t count, size_t size) {  // zeros, aligned for vectors
    if (size && count > (SIZE_MAX - 63) / size) fail("not enough memory for %zu elements of %zu bytes", count, size);
    size_t bytes = (count * size + 63) / 64 * 64;
    void *memory = aligned_alloc(64, bytes ? bytes : 64);
    if (!memory) fail("not enough memory: %zu MB cannot be allocated", bytes >> 20);
    return memset(memory, 0, bytes ? bytes : 64);
}

static size_t min(size_t a, size_t b) { return a < b ? a : b; }

static float *zeros(size_t count) { return allocate(count, sizeof(float)); }

// safetensors: eight bytes (the length of the header), the header (JSON), the numbers. The header is untrusted:
// every value is checked before it is used, and nothing is read past its end.

enum { MAX_DIMS = 8, MAX_HEADER_BYTES = 100000000 };

typedef struct {
    const char *name;  // in the header, without quotes; not null-terminated
    size_t name_length;
    const char *dtype;
    size_t dims, shape[MAX_DIMS];
    size_t begin, end;  // offsets of its bytes in the data
    bool used;          // it belongs to GPT-2
} Tensor;

typedef struct {
    Tensor *tensors;
    size_t count;
    const uint8_t *data;  // the bytes after the header
    const char *error;    // what is wrong with the file, or NULL
} Index;

typedef struct {
    const char *cursor, *end;
    const char *error;  // the first one, or NULL
} Parser;

static bool set_error(Parser *p, const char *error) {
    if (!p->error) p->error = error;
    return false;
}

static bool is_space(char c) { return c == ' ' || c == '\n' || c == '\r' || c == '\t'; }

static void skip_space(Parser *p) {
    while (p->cursor < p->end && is_space(*p->cursor)) p->cursor++;
}

static bool accept(Parser *p, char c) {  // consumes c if it comes next
    skip_space(p);
    if (p->cursor == p->end || *p->cursor != c) return false;
    p->cursor++;
    return true;
}

static bool expect(Parser *p, char c) {
    return accept(p, c) || set_error(p, "the header is not valid safetensors JSON");
}

static bool read_string(Parser *p, const char **start, size_t *length) {
    if (!expect(p, '"')) return false;
    *start = p->cursor;
    while (p->cursor < p->end && *p->cursor != '"') {
        if ((unsigned char)*p->cursor < 0x20)
            return set_error(p, "a string in the header contains a control character");
        if (*p->cursor == '\\' && ++p->cursor == p->end) break;  // an escaped quote does not end the string
        p->cursor++;
    }
    if (p->cursor == p->end) return set_error(p, "the header ends inside a string");
    *length = (size_t)(p->cursor++ - *start);
    return true;
}

static bool read_size(Parser *p, size_t *value) {
    skip_space(p);
    if (p->cursor == p->end || *p->cursor < '0' || *p->cursor > '9')
        return set_error(p, "the header lacks a non-negative integer where one is required");
    for (*value = 0; p->cursor < p->end && *p->cursor >= '0' && *p->cursor <= '9'; p->cursor++) {
        size_t digit = (size_t)(*p->cursor - '0');
        if (*value > (SIZE_MAX - digit) / 10) return set_error(p, "a number in the header is too large");
        *value = *value * 10 + digit;
    }
    return true;
}

static bool equals(const char *text, size_t length, const char *word) {
    return strlen(word) == length && !memcmp(text, word, length);
}

static bool read_sizes(Parser *p, size_t *values, size_t max_count, size_t *count) {
    if (!expect(p, '[')) return false;
    *count = 0;
    if (accept(p, ']')) return true;
    do {
        if (*count == max_count) return set_error(p, "a list in the header is too long");
        if (!read_size(p, &values[(*count)++])) return false;
    } while (accept(p, ','));
    return expect(p, ']');
}

static const struct { const char *name; size_t size; } DTYPES[] = {
    {"F32", 4}, {"F16", 2}, {"BF16", 2}, {"F64", 8}, {"BOOL", 1}, {"U8", 1}, {"I8", 1}, {"F8_E4M3", 1},
    {"F8_E5M2", 1}, {"U16", 2}, {"I16", 2}, {"U32", 4}, {"I32", 4}, {"U64", 8}, {"I64", 8},
};

static bool read_tensor(Parser *p, Tensor *tensor, size_t available) {
    enum { HAS_DTYPE = 1, HAS_SHAPE = 2, HAS_OFFSETS = 4 };
    size_t count, offsets[2], size = 0, seen = 0;
    if (!expect(p, '{')) return false;
    do {
        const char *key, *value;
        size_t key_length, value_length;
        if (!read_string(p, &key, &key_length) || !expect(p, ':')) return false;
        if (equals(key, key_length, "dtype") && !(seen & HAS_DTYPE)) {
            seen |= HAS_DTYPE;
            if (!read_string(p, &value, &value_length)) return false;
            for (size_t i = 0; i < sizeof DTYPES / sizeof *DTYPES; i++)
                if (equals(value, value_length, DTYPES[i].name)) tensor->dtype = DTYPES[i].name, size = DTYPES[i].size;
            if (!size) return set_error(p, "a tensor has an unknown dtype");
        } else if (equals(key, key_length, "shape") && !(seen & HAS_SHAPE)) {
            seen |= HAS_SHAPE;
            if (!read_sizes(p, tensor->shape, MAX_DIMS, &tensor->dims)) return false;
        } else if (equals(key, key_length, "data_offsets") && !(seen & HAS_OFFSETS)) {
            seen |= HAS_OFFSETS;
            if (!read_sizes(p, offsets, 2, &count)) return false;
            if (count != 2) return set_error(p, "a tensor's data_offsets are not two numbers");
        } else {
            return set_error(p, "a tensor in the header has a repeated or unknown key");
        }
    } while (accept(p, ','));
    if (!expect(p, '}')) return false;
    if (seen != (HAS_DTYPE | HAS_SHAPE | HAS_OFFSETS))
        return set_error(p, "a tensor in the header lacks its dtype, shape or data_offsets");
    tensor->begin = offsets[0], tensor->end = offsets[1];
    if (tensor->begin > tensor->end || tensor->end > available)
        return set_error(p, "a tensor is outside the file: the file is truncated, or the header is wrong");
    for (size_t i = 0; i < tensor->dims; i++) {
        if (tensor->shape[i] && size > SIZE_MAX / tensor->shape[i])
            return set_error(p, "a tensor's shape is too large");
        size *= tensor->shape[i];
    }
    if (size != tensor->end - tensor->begin) return set_error(p, "a tensor's shape does not match its number of bytes");
    return true;
}

static int compare_offsets(const void *a, const void *b) {
    const Tensor *x = a, *y = b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    return x->end < y->end ? -1 : x->end > y->end;
}

static int compare_names(const void *a, const void *b) {
    const Tensor *x = a, *y = b;
    int order = memcmp(x->name, y->name, x->name_length < y->name_length ? x->name_length : y->name_length);
    return order ? order : x->name_length < y->name_length ? -1 : x->name_length > y->name_length;
}

static Index index_error(Index index, const char *error) {
    free(index.tensors);
    return (Index){.error = error};
}

// The tensors of a file of `size` bytes, sorted by name. They must fill the file without gap or overlap. The caller
// frees `tensors`.
static Index read_index(const uint8_t *bytes, size_t size) {
    Index index = {0};
    uint64_t length = 0;
    if (size < 8) return index_error(index, "it is shorter than 8 bytes");
    for (int i = 0; i < 8; i++) length |= (uint64_t)bytes[i] << (8 * i);
    if (length > MAX_HEADER_BYTES) return index_error(index, "the header is longer than 100 MB");
    if (length > size - 8) return index_error(index, "it ends inside the header: the file is truncated");
    Parser p = {(const char *)bytes + 8, (const char *)bytes + 8 + length, NULL};
    index.data = bytes + 8 + length;
    size_t available = size - 8 - (size_t)length, allocated = 0;
    expect(&p, '{');
    bool more = !p.error && !accept(&p, '}');
    while (more) {
        const char *name, *ignored;
        size_t name_length, ignored_length;
        if (!read_string(&p, &name, &name_length) || !expect(&p, ':')) break;
        if (equals(name, name_length, "__metadata__")) {  // an object of strings
            expect(&p, '{');
            for (bool inside = !p.error && !accept(&p, '}'); inside;) {
                if (!read_string(&p, &ignored, &ignored_length) || !expect(&p, ':')) break;
                if (!read_string(&p, &ignored, &ignored_length)) break;
                inside = accept(&p, ',');
                if (!inside) expect(&p, '}');
            }
        } else {
            if (index.count == allocated) {
                allocated = allocated ? 2 * allocated : 64;
                Tensor *larger = realloc(index.tensors, allocated * sizeof *larger);
                if (!larger) return index_error(index, "there is not enough memory for the header");
                index.tensors = larger;
            }
            index.tensors[index.count] = (Tensor){.name = name, .name_length = name_length};
            if (!read_tensor(&p, &index.tensors[index.count], available)) break;
            index.count++;
        }
        if (p.error) break;
        more = accept(&p, ',');
        if (!more) expect(&p, '}');
    }
    skip_space(&p);
    if (!p.error && p.cursor != p.end) set_error(&p, "there is text after the JSON in the header");
    if (p.error) return index_error(index, p.error);
    if (!index.count) return index_error(index, "it contains no tensors");
    qsort(index.tensors, index.count, sizeof *index.tensors, compare_offsets);
    size_t filled = 0;
    for (size_t i = 0; i < index.count; i++) {
        if (index.tensors[i].begin < filled) return index_error(index, "two tensors overlap");
        if (index.tensors[i].begin > filled) return index_error(index, "there is a gap between two tensors");
        filled = index.tensors[i].end;
    }
    if (filled != available) return index_error(index, "it is longer than the header says");
    qsort(index.tensors, index.count, sizeof *index.tensors, compare_names);
    for (size_t i = 1; i < index.count; i++)
        if (!compare_names(&index.tensors[i - 1], &index.tensors[i]))
            return index_error(index, "two tensors have the same name");
    return index;
}

#ifdef FUZZ  // clang -fsanitize=fuzzer,address,undefined -DFUZZ: reads arbitrary bytes as a file
int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    Index index = read_index(bytes, size);
    unsigned sum = 0;  // read every byte that the index refers to
    for (size_t i = 0; i < index.count; i++) {
        for (size_t k = 0; k < index.tensors[i].name_length; k++) sum += (unsigned char)index.tensors[i].name[k];
        for (size_t k = index.tensors[i].begin; k < index.tensors[i].end; k++) sum += index.data[k];
    }
    free(index.tensors);
    return sum == 0xffffffffu;
}
#endif

// The weights: one block of memory, and a pointer to each tensor in it. The gradients and the two running means of
// AdamW have the same layout.

typedef struct { size_t V, block, C, H, L; } Shape;  // vocabulary, longest context, width, heads, layers

enum { LN_1, LN_1_BIAS, ATTN, ATTN_BIAS, PROJ, PROJ_BIAS, LN_2, LN_2_BIAS, FC, FC_BIAS, OUT, OUT_BIAS, PER_LAYER };
static const struct { const char *name; size_t rows, columns; } LAYER_TENSORS[PER_LAYER] = {  // in multiples of C
    {"ln_1.weight", 0, 1}, {"ln_1.bias", 0, 1}, {"attn.c_attn.weight", 1, 3}, {"attn.c_attn.bias", 0, 3},
    {"attn.c_proj.weight", 1, 1}, {"attn.c_proj.bias", 0, 1}, {"ln_2.weight", 0, 1}, {"ln_2.bias", 0, 1},
    {"mlp.c_fc.weight", 1, 4}, {"mlp.c_fc.bias", 0, 4}, {"mlp.c_proj.weight", 4, 1}, {"mlp.c_proj.bias", 0, 1},
};  // rows 0: a vector
enum { WTE, WPE, LN_F, LN_F_BIAS, FIRST_LAYER };  // followed by the tensors of layer 0, layer 1, …

typedef struct { char name[64]; size_t rows, columns; } TensorSpec;  // a tensor's name and shape; rows 0: (columns,)

static size_t tensor_count(Shape s) { return FIRST_LAYER + s.L * PER_LAYER; }

static TensorSpec tensor_spec(Shape s, size_t i) {
    TensorSpec spec = {.columns = s.C};
    if (i >= FIRST_LAYER) {
        size_t l = (i - FIRST_LAYER) / PER_LAYER, k = (i - FIRST_LAYER) % PER_LAYER;
        snprintf(spec.name, sizeof spec.name, "h.%zu.%s", l, LAYER_TENSORS[k].name);
        spec.rows = LAYER_TENSORS[k].rows * s.C, spec.columns = LAYER_TENSORS[k].columns * s.C;
        return spec;
    }
    static const char *names[] = {"wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"};
    snprintf(spec.name, sizeof spec.name, "%s", names[i]);
    spec.rows = i == WTE ? s.V : i == WPE ? s.block : 0;
    return spec;
}

static size_t element_count(TensorSpec spec) { return (spec.rows ? spec.rows : 1) * spec.columns; }

typedef struct { float *data, **tensors; size_t count; } Weights;  // count: of floats

static Weights make_weights(Shape s) {
    Weights w = {.tensors = allocate(tensor_count(s), sizeof(float *))};
    for (size_t i = 0; i < tensor_count(s); i++) w.count += element_count(tensor_spec(s, i));
    w.data = zeros(w.count);
    for (size_t i = 0, offset = 0; i < tensor_count(s); i++) {
        w.tensors[i] = w.data + offset;
        offset += element_count(tensor_spec(s, i));
    }
    return w;
}

static void free_weights(Weights w) { free(w.data), free(w.tensors); }

static float **layer_tensors(Weights w, size_t l) { return w.tensors + FIRST_LAYER + l * PER_LAYER; }

static Tensor *find_tensor(Index index, const char *name) {  // with or without the prefix "transformer."
    for (int prefixed = 0; prefixed < 2; prefixed++) {
        char full_name[96];
        snprintf(full_name, sizeof full_name, "%s%s", prefixed ? "transformer." : "", name);
        Tensor key = {.name = full_name, .name_length = strlen(full_name)};
        Tensor *found = bsearch(&key, index.tensors, index.count, sizeof key, compare_names);
        if (found) return found;
    }
    return NULL;
}

static const Tensor *require_matrix(Index index, const char *path, const char *name) {
    const Tensor *tensor = find_tensor(index, name);
    if (!tensor || tensor->dims != 2 || !tensor->shape[0] || !tensor->shape[1])
        fail("%s is not a GPT-2 model: it has no matrix %s", path, name);
    return tensor;
}

// Find a tensor of GPT-2, and check its dtype and shape.
static Tensor *require_tensor(Index index, const char *path, TensorSpec spec) {
    Tensor *tensor = find_tensor(index, spec.name);
    if (!tensor) fail("%s is not a GPT-2 model: %s is missing", path, spec.name);
    if (strcmp(tensor->dtype, "F32")) fail("%s: %s has dtype %s, expected F32", path, spec.name, tensor->dtype);
    bool fits = spec.rows ? tensor->dims == 2 && tensor->shape[0] == spec.rows && tensor->shape[1] == spec.columns
                          : tensor->dims == 1 && tensor->shape[0] == spec.columns;
    if (!fits) fail("%s: the shape of %s does not fit a GPT-2 of this width", path, spec.name);
    tensor->used = true;
    return tensor;
}

static bool ends_with(Tensor tensor, const char *suffix) {
    size_t length = strlen(suffix);
    return tensor.name_length >= length && !memcmp(tensor.name + tensor.name_length - length, suffix, length);
}

static Weights load(const char *path, Shape *s, size_t heads) {
    int descriptor = open(path, O_RDONLY);
    struct stat info;
    if (descriptor < 0 || fstat(descriptor, &info) || !S_ISREG(info.st_mode)) fail("%s cannot be read", path);
    size_t size = (size_t)info.st_size;
    const uint8_t *bytes = size ? mmap(NULL, size, PROT_READ, MAP_PRIVATE, descriptor, 0) : NULL;
    close(descriptor);
    if (bytes == MAP_FAILED) fail("%s cannot be mapped into memory", path);
    Index index = read_index(bytes, size);
    if (index.error) fail("%s is not a valid safetensors file: %s", path, index.error);

    const Tensor *wte = require_matrix(index, path, "wte.weight"), *wpe = require_matrix(index, path, "wpe.weight");
    *s = (Shape){.V = wte->shape[0], .C = wte->shape[1], .block = wpe->shape[0]};
    s->H = heads ? heads : s->C < 64 ? 1 : s->C / 64;  // the heads of every GPT-2 are 64 wide
    if (s->C % s->H) fail("the width %zu cannot be divided into %zu heads: set --heads to a divisor", s->C, s->H);
    char norm_name[64];
    do snprintf(norm_name, sizeof norm_name, "h.%zu.ln_1.weight", s->L);
    while (find_tensor(index, norm_name) && ++s->L);
    if (!s->L) fail("%s is not a GPT-2 model: it has no layer 0", path);

    // all shapes are checked before any memory is allocated: the total is then at most the size of the file
    for (size_t i = 0; i < tensor_count(*s); i++) require_tensor(index, path, tensor_spec(*s, i));
    for (size_t i = 0; i < index.count; i++) {
        Tensor extra = index.tensors[i];  // some files also have masks and the output layer
        if (extra.used || ends_with(extra, ".attn.bias") || ends_with(extra, ".attn.masked_bias")) continue;
        if (!ends_with(extra, "lm_head.weight"))
            fail("%s is not a GPT-2 model: unexpected tensor %.*s", path, (int)min(extra.name_length, 80), extra.name);
    }
    Weights w = make_weights(*s);
    for (size_t i = 0; i < tensor_count(*s); i++) {
        TensorSpec spec = tensor_spec(*s, i);
        const Tensor *tensor = require_tensor(index, path, spec);
        memcpy(w.tensors[i], index.data + tensor->begin, tensor->end - tensor->begin);
    }
    free(index.tensors);
    munmap((void *)bytes, size);
    return w;
}

// A file is written as PATH.part, and renamed when it is complete.
static char *partial_path(const char *path) {
    char *partial = allocate(strlen(path) + 6, 1);
    sprintf(partial, "%s.part", path);
    return partial;
}

// Fail before the training if the file for its result cannot be written.
static void check_writable(const char *path) {
    char *partial = partial_path(path);
    FILE *file = fopen(partial, "wb");
    if (!file || fclose(file) || remove(partial)) fail("%s cannot be written", path);
    free(partial);
}

// Write all tensors as safetensors.
static void save(const char *path, Shape s, Weights w) {
    size_t n = tensor_count(s), capacity = n * 160 + 64, length = 0, offset = 0;
    char *header = allocate(capacity, 1), *partial = partial_path(path);
    for (size_t i = 0; i < n; i++) {
        TensorSpec spec = tensor_spec(s, i);
        char rows[32] = "";
        if (spec.rows) snprintf(rows, sizeof rows, "%zu,", spec.rows);
        size_t bytes = element_count(spec) * sizeof(float);
        length += (size_t)snprintf(header + length, capacity - length,
            "%c\"%s\":{\"dtype\":\"F32\",\"shape\":[%s%zu],\"data_offsets\":[%zu,%zu]}",
            i ? ',' : '{', spec.name, rows, spec.columns, offset, offset + bytes);
        offset += bytes;
    }
    header[length++] = '}';
    while (length % 8) header[length++] = ' ';
    uint8_t length_bytes[8];
    for (int i = 0; i < 8; i++) length_bytes[i] = (uint8_t)(length >> (8 * i));
    FILE *file = fopen(partial, "wb");
    bool complete = file && fwrite(length_bytes, 1, 8, file) == 8 && fwrite(header, 1, length, file) == length &&
                 fwrite(w.data, sizeof(float), w.count, file) == w.count && !fflush(file) && !fsync(fileno(file));
    if (file && fclose(file)) complete = false;
    if (!complete || rename(partial, path)) fail("%s cannot be written", path);
    free(header), free(partial);
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
typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));

// A matrix in memory: element (i, j) is data[i * row_stride + j * column_stride].
typedef struct { const float *data; size_t row_stride, column_stride; } View;

static View row_major(const float *data, size_t width) { return (View){data, width, 1}; }
static View transposed(const float *data, size_t width) { return (View){data, 1, width}; }

// Pack `count` rows of a view from row i on, columns k to k + depth, into out (depth, width): column by column, with
// 0 for the missing width - count rows.
static void pack(View v, size_t i, size_t count, size_t k, size_t depth, size_t width, float *out) {
    const float *source = v.data + i * v.row_stride + k * v.column_stride;
    if (v.row_stride == 1 && count == width) {
        for (size_t d = 0; d < depth; d++) memcpy(out + d * width, source + d * v.column_stride, width * sizeof(float));
        return;
    }
    enum { CACHE_LINE = 16 };  // one cache line of numbers of each row, then the next cache line of each row
    for (size_t start = 0; start < depth; start += CACHE_LINE)
        for (size_t r = 0; r < width; r++)
            for (size_t d = start; d < min(depth, start + CACHE_LINE); d++)
                out[d * width + r] = r < count ? source[r * v.row_stride + d * v.column_stride] : 0.0f;
}

static void matmul_tile(size_t depth, const float *a, const float *b, float *c, size_t c_stride, size_t rows,
                        size_t columns, bool accumulate) {
    Vector sums[MR][NV] = {0};
    for (size_t k = 0; k < depth; k++, a += MR, b += NR) {
        const Vector *right = (const Vector *)b;
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++) sums[i][j] += a[i] * right[j];
    }
    float out[MR][NR];
    memcpy(out, sums, sizeof out);
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < columns; j++) {
            float *sum = &c[i * c_stride + j];
            *sum = out[i][j] + (accumulate ? *sum : 0.0f);
        }
}

// For few rows of A: B is read once for each row, so packing would not pay.
static void matmul_few_rows(size_t M, size_t N, size_t K, View a, View b, float *c, size_t c_stride, bool accumulate) {
    enum { CHUNK = 256 };  // columns
    PARALLEL_FOR
    for (size_t chunk = 0; chunk < (N + CHUNK - 1) / CHUNK; chunk++) {
        size_t begin = chunk * CHUNK, end = min(N, begin + CHUNK);
        for (size_t i = 0; i < M; i++) {
            float *out = c + i * c_stride;
            if (b.row_stride == 1) {  // columns are contiguous
                for (size_t j = begin; j < end; j++) {
                    Vector sums[4] = {0};
                    const float *column = b.data + j * b.column_stride;
                    size_t k = 0;
                    for (; a.column_stride == 1 && k + 4 * LANES <= K; k += 4 * LANES) {
                        const Vector *x = (const Vector *)(a.data + i * a.row_stride + k);
                        const Vector *y = (const Vector *)(column + k);
                        for (int v = 0; v < 4; v++) sums[v] += x[v] * y[v];
                    }
                    Vector all = sums[0] + sums[1] + sums[2] + sums[3];
                    float sum = 0;
                    for (int v = 0; v < LANES; v++) sum += all[v];
                    for (; k < K; k++) sum += a.data[i * a.row_stride + k * a.column_stride] * column[k];
                    out[j] = sum + (accumulate ? out[j] : 0.0f);
                }
            } else {
                if (!accumulate) memset(out + begin, 0, (end - begin) * sizeof(float));
                size_t k = 0;
                for (; b.column_stride == 1 && k + 4 <= K; k += 4) {  // four rows of B for each pass over out
                    const float *x = a.data + i * a.row_stride + k * a.column_stride;
                    const float *row = b.data + k * b.row_stride;
                    float x0 = x[0], x1 = x[a.column_stride], x2 = x[2 * a.column_stride], x3 = x[3 * a.column_stride];
                    for (size_t j = begin; j < end; j++)
                        out[j] += x0 * row[j] + x1 * row[j + b.row_stride] + x2 * row[j + 2 * b.row_stride] +
                                  x3 * row[j + 3 * b.row_stride];
                }
                for (; k < K; k++) {
                    float x = a.data[i * a.row_stride + k * a.column_stride];
                    const float *row = b.data + k * b.row_stride;
                    for (size_t j = begin; j < end; j++) out[j] += x * row[j * b.column_stride];
                }
            }
        }
    }
}

// C = A B, or C += A B if `accumulate`; `c_stride` is the row stride of C.
static void matmul(size_t M, size_t N, size_t K, View a, View b, float *c, size_t c_stride, bool accumulate) {
    if (M < 4) {
        matmul_few_rows(M, N, K, a, b, c, c_stride, accumulate);
        return;
    }
    View b_columns = {b.data, b.column_stride, b.row_stride};
    size_t a_panels = (M + MR - 1) / MR, b_panels = (N + NR - 1) / NR;
    bool a_is_smaller = M <= N;  // the smaller factor is packed once, the other one panel by panel
    float *packed = zeros((a_is_smaller ? a_panels * MR : b_panels * NR) * min(K, KC));
    for (size_t k = 0; k < K; k += KC) {
        size_t depth = min(K - k, KC);
        bool accumulate_block = accumulate || k;
        PARALLEL {
            float *panel = zeros((a_is_smaller ? NR : MR) * depth);
            SHARED_FOR
            for (size_t p = 0; p < (a_is_smaller ? a_panels : b_panels); p++) {
                if (a_is_smaller) pack(a, p * MR, min(MR, M - p * MR), k, depth, MR, packed + p * MR * depth);
                else pack(b_columns, p * NR, min(NR, N - p * NR), k, depth, NR, packed + p * NR * depth);
            }
            SHARED_FOR
            for (size_t p = 0; p < (a_is_smaller ? b_panels : a_panels); p++) {
                if (a_is_smaller) pack(b_columns, p * NR, min(NR, N - p * NR), k, depth, NR, panel);
                else pack(a, p * MR, min(MR, M - p * MR), k, depth, MR, panel);
                for (size_t q = 0; q < (a_is_smaller ? a_panels : b_panels); q++) {
                    size_t i = a_is_smaller ? q : p, j = a_is_smaller ? p : q;
                    const float *left = a_is_smaller ? packed + q * MR * depth : panel;
                    const float *right = a_is_smaller ? panel : packed + q * NR * depth;
                    matmul_tile(depth, left, right, c + i * MR * c_stride + j * NR, c_stride, min(MR, M - i * MR),
                                min(NR, N - j * NR), accumulate_block);
                }
            }
            free(panel);
        }
    }
    free(packed);
}

// Operations, each followed by its backward pass.

// y = x W + b: x (N, I), w (I, O), b (O,) -> y (N, O); or y += if `accumulate`.
static void linear(float *y, const float *x, const float *w, const float *b, size_t N, size_t I, size_t O,
                   bool accumulate) {
    PARALLEL_FOR
    for (size_t n = 0; n < N; n++)
        for (size_t o = 0; o < O; o++) y[n * O + o] = b[o] + (accumulate ? y[n * O + o] : 0.0f);
    matmul(N, O, I, row_major(x, I), row_major(w, O), y, O, true);
}

// out (C,) += Σ_n a (N, C), or Σ_n a b if b is not NULL.
static void sum_rows(float *out, const float *a, const float *b, size_t N, size_t C) {
    enum { CHUNK = 64 };
    PARALLEL_FOR
    for (size_t chunk = 0; chunk < (C + CHUNK - 1) / CHUNK; chunk++)
        for (size_t n = 0; n < N; n++)
            for (size_t c = chunk * CHUNK; c < min(C, (chunk + 1) * CHUNK); c++)
                out[c] += a[n * C + c] * (b ? b[n * C + c] : 1.0f);
}

// dx = dy Wᵀ (N, I),  dW += xᵀ dy (I, O),  db += Σ_n dy (O,).
static void linear_backward(float *dx, float *dw, float *db, const float *dy, const float *x, const float *w, size_t N,
                            size_t I, size_t O) {
    matmul(N, I, O, row_major(dy, O), transposed(w, O), dx, I, false);
    matmul(I, O, N, transposed(x, I), row_major(dy, O), dw, O, true);
    sum_rows(db, dy, NULL, N, O);
}

// y = g n + b, where n = (x - μ) / σ of each row: x (N, C), g and b (C,) -> y, n (N, C), inverse_std = 1 / σ (N,).
static void layer_norm(float *y, float *n, float *inverse_std, const float *x, const float *g, const float *b, size_t N,
                       size_t C) {
    PARALLEL_FOR
    for (size_t t = 0; t < N; t++) {
        const float *row = x + t * C;
        double mean = 0, variance = 0;
        for (size_t c = 0; c < C; c++) mean += row[c];
        mean /= (double)C;
        for (size_t c = 0; c < C; c++) variance += (row[c] - mean) * (row[c] - mean);
        inverse_std[t] = (float)(1 / sqrt(variance / (double)C + EPS));
        for (size_t c = 0; c < C; c++) {
            n[t * C + c] = (row[c] - (float)mean) * inverse_std[t];
            y[t * C + c] = n[t * C + c] * g[c] + b[c];
        }
    }
}

// dn = g dy;  dx += (dn - mean(dn) - n mean(n dn)) / σ,  dg += Σ_t dy n,  db += Σ_t dy.
static void layer_norm_backward(float *dx, float *dg, float *db, const float *dy, const float *n,
                                const float *inverse_std, const float *g, size_t N, size_t C) {
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
            dx[t * C + c] += (dn - (float)mean - n[t * C + c] * (float)along) * inverse_std[t];
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

// p_i = exp(z_i) / Σ_j exp(z_j) of the first `count` of `row_length` elements; the others become 0. In place. The
// largest z is subtracted first. Returns log Σ_j exp(z_j).
static double softmax(float *z, size_t count, size_t row_length) {
    float largest = -FLT_MAX;
    double total = 0;
    for (size_t i = 0; i < count; i++) largest = z[i] > largest ? z[i] : largest;
    for (size_t i = 0; i < count; i++) total += z[i] = expf(z[i] - largest);
    for (size_t i = 0; i < count; i++) z[i] *= (float)(1 / total);
    memset(z + count, 0, (row_length - count) * sizeof(float));
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
    size_t D = C / H, start = S - T;
    float scale = 1.0f / sqrtf((float)D);
    PARALLEL_FOR
    for (size_t bh = 0; bh < B * H; bh++) {
        size_t b = bh / H, h = bh % H;
        const float *q = qkv + (b * S + start) * 3 * C + h * D, *k = qkv + b * S * 3 * C + C + h * D, *v = k + C;
        float *weights = p + bh * T * S;
        matmul(T, S, D, row_major(q, 3 * C), transposed(k, 3 * C), weights, S, false);
        for (size_t t = 0; t < T; t++) {
            for (size_t s = 0; s <= start + t; s++) weights[t * S + s] *= scale;
            softmax(weights + t * S, start + t + 1, S);
        }
        matmul(T, D, S, row_major(weights, S), row_major(v, 3 * C), y + b * T * C + h * D, C, false);
    }
}

// dP = dy vᵀ,  dS = softmax'(dP) / √D;  dq = dS k,  dk = dSᵀ q,  dv = Pᵀ dy: dqkv (B, T, 3C).
static void attention_backward(float *dqkv, float *dp, const float *dy, const float *p, const float *qkv, size_t B,
                               size_t T, size_t C, size_t H) {
    size_t D = C / H;
    PARALLEL_FOR
    for (size_t bh = 0; bh < B * H; bh++) {
        size_t b = bh / H, h = bh % H, offset = b * T * 3 * C + h * D;
        const float *q = qkv + offset, *k = q + C, *v = k + C, *dout = dy + b * T * C + h * D;
        const float *weights = p + bh * T * T;
        float *ds = dp + bh * T * T;
        matmul(T, T, D, row_major(dout, C), transposed(v, 3 * C), ds, T, false);
        for (size_t t = 0; t < T; t++) {
            softmax_backward(ds + t * T, weights + t * T, t + 1, 1.0f / sqrtf((float)D));
            memset(ds + t * T + t + 1, 0, (T - t - 1) * sizeof(float));
        }
        matmul(T, D, T, row_major(ds, T), row_major(k, 3 * C), dqkv + offset, 3 * C, false);
        matmul(T, D, T, transposed(ds, T), row_major(q, 3 * C), dqkv + offset + C, 3 * C, false);
        matmul(T, D, T, transposed(weights, T), row_major(dout, C), dqkv + offset + 2 * C, 3 * C, false);
    }
}

// x_n = wte[id_n] + wpe[position]: (N,) -> (N, C), for positions from `start` on.
static void embedding(float *x, const uint16_t *ids, const float *wte, const float *wpe, size_t B, size_t T,
                      size_t start, size_t C) {
    PARALLEL_FOR
    for (size_t n = 0; n < B * T; n++)
        for (size_t c = 0; c < C; c++) x[n * C + c] = wte[ids[n] * C + c] + wpe[(start + n % T) * C + c];
}

// dwte[id_n] += dx_n, once for each occurrence of a token.  dwpe[position] += dx_n.
static void embedding_backward(float *dwte, float *dwpe, const float *dx, const uint16_t *ids, size_t N, size_t T,
                               size_t C) {
    for (size_t n = 0; n < N; n++)
        for (size_t c = 0; c < C; c++) {
            dwte[ids[n] * C + c] += dx[n * C + c];
            dwpe[n % T * C + c] += dx[n * C + c];
        }
}

// The mean of -log p of the targets, in nats: logits (N, V), which become p.
static double cross_entropy(float *logits, const uint16_t *targets, size_t N, size_t V) {
    double *losses = allocate(N, sizeof *losses), total = 0;
    PARALLEL_FOR
    for (size_t n = 0; n < N; n++) {
        double target_logit = logits[n * V + targets[n]];
        losses[n] = softmax(logits + n * V, V, V) - target_logit;
    }
    for (size_t n = 0; n < N; n++) total += losses[n];
    free(losses);
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

// The model. The activations of a layer, which the backward pass or, with a KV cache, the following tokens need.

typedef struct {
    float *a, *n_1, *inverse_std_1, *qkv, *p, *y;   // (N, C) (N, C) (N,) (N, 3C) (B, H, T, S) (N, C)
    float *m, *n_2, *inverse_std_2, *hidden, *act;  // (N, C) (N, C) (N,) (N, 4C) (N, 4C)
} LayerActivations;

typedef enum { EVALUATE, TRAIN, GENERATE } Mode;  // loss only; a backward pass follows; with a KV cache, one row

typedef struct {
    LayerActivations *layers;
    float *x, *f, *n_f, *inverse_std_f, *logits;  // (N, C) each, (N,), (N, V)
    Mode mode;
} Activations;

static Activations make_activations(Shape s, size_t N, size_t T, Mode mode) {
    if (N > SIZE_MAX / 64 / (s.V + 4 * s.C + s.H * T)) fail("a batch of %zu tokens does not fit in memory", N);
    Activations acts = {.layers = allocate(s.L, sizeof(LayerActivations)), .mode = mode};
    size_t C = s.C;
    for (size_t l = 0; l < s.L; l++) {
        if (l && mode != TRAIN) {  // layers share their memory
            acts.layers[l] = acts.layers[0];
            if (mode == GENERATE) acts.layers[l].qkv = zeros(N * 3 * C);
            continue;
        }
        acts.layers[l] = (LayerActivations){
            .a = zeros(N * C), .n_1 = zeros(N * C), .inverse_std_1 = zeros(N), .qkv = zeros(N * 3 * C),
            .p = zeros(N * s.H * T), .y = zeros(N * C), .m = zeros(N * C), .n_2 = zeros(N * C),
            .inverse_std_2 = zeros(N), .hidden = zeros(N * 4 * C), .act = zeros(N * 4 * C),
        };
    }
    acts.x = zeros(N * C), acts.f = zeros(N * C), acts.n_f = zeros(N * C), acts.inverse_std_f = zeros(N);
    acts.logits = zeros((mode == GENERATE ? 1 : N) * s.V);
    return acts;
}

static void free_activations(Shape s, Activations acts) {
    for (size_t l = 0; l < s.L; l++) {
        LayerActivations layer = acts.layers[l];
        if (!l || acts.mode != EVALUATE) free(layer.qkv);
        if (l && acts.mode != TRAIN) continue;  // all other memory is that of layer 0
        free(layer.a), free(layer.n_1), free(layer.inverse_std_1), free(layer.p), free(layer.y);
        free(layer.m), free(layer.n_2), free(layer.inverse_std_2), free(layer.hidden), free(layer.act);
    }
    free(acts.layers), free(acts.x), free(acts.f), free(acts.n_f), free(acts.inverse_std_f), free(acts.logits);
}

// Ids (B, T) -> f (N, C), the input of the output layer. With mode GENERATE, `start` tokens are in the KV cache.
static void forward(Shape s, Weights w, Activations *acts, const uint16_t *ids, size_t B, size_t T, size_t start) {
    size_t N = B * T, C = s.C;
    float *x = acts->x;
    embedding(x, ids, w.tensors[WTE], w.tensors[WPE], B, T, start, C);
    for (size_t l = 0; l < s.L; l++) {
        LayerActivations layer = acts->layers[l];
        float **lw = layer_tensors(w, l);
        layer_norm(layer.a, layer.n_1, layer.inverse_std_1, x, lw[LN_1], lw[LN_1_BIAS], N, C);
        linear(layer.qkv + start * 3 * C, layer.a, lw[ATTN], lw[ATTN_BIAS], N, C, 3 * C, false);
        attention(layer.y, layer.p, layer.qkv, B, T, start + T, C, s.H);
        linear(x, layer.y, lw[PROJ], lw[PROJ_BIAS], N, C, C, true);
        layer_norm(layer.m, layer.n_2, layer.inverse_std_2, x, lw[LN_2], lw[LN_2_BIAS], N, C);
        linear(layer.hidden, layer.m, lw[FC], lw[FC_BIAS], N, C, 4 * C, false);
        gelu(layer.act, layer.hidden, N * 4 * C);
        linear(x, layer.act, lw[OUT], lw[OUT_BIAS], N, 4 * C, C, true);
    }
    layer_norm(acts->f, acts->n_f, acts->inverse_std_f, x, w.tensors[LN_F], w.tensors[LN_F_BIAS], N, C);
}

static double compute_loss(Shape s, Weights w, Activations *acts, const uint16_t *ids, const uint16_t *targets,
                           size_t B, size_t T, FILE *logits) {
    forward(s, w, acts, ids, B, T, 0);
    matmul(B * T, s.V, s.C, row_major(acts->f, s.C), transposed(w.tensors[WTE], s.C), acts->logits, s.V, false);
    if (logits && fwrite(acts->logits, sizeof(float), B * T * s.V, logits) != B * T * s.V)
        fail("the logits cannot be written");
    return cross_entropy(acts->logits, targets, B * T, s.V);
}

// The operations of `compute_loss` in reverse order; adds to the gradients g.
static void backward(Shape s, Weights w, Weights g, Activations *acts, const uint16_t *ids, const uint16_t *targets,
                     size_t B, size_t T) {
    size_t N = B * T, C = s.C;
    float *dx = zeros(N * C), *dy = zeros(N * C), *dhidden = zeros(N * 4 * C), *dp = zeros(N * s.H * T);
    cross_entropy_backward(acts->logits, targets, N, s.V);
    matmul(N, C, s.V, row_major(acts->logits, s.V), row_major(w.tensors[WTE], C), dy, C, false);
    matmul(s.V, C, N, transposed(acts->logits, s.V), row_major(acts->f, C), g.tensors[WTE], C, true);
    layer_norm_backward(dx, g.tensors[LN_F], g.tensors[LN_F_BIAS], dy, acts->n_f, acts->inverse_std_f, w.tensors[LN_F],
                        N, C);
    for (size_t l = s.L; l-- > 0;) {
        LayerActivations layer = acts->layers[l];
        float **lw = layer_tensors(w, l), **lg = layer_tensors(g, l), *dqkv = dhidden;
        linear_backward(dhidden, lg[OUT], lg[OUT_BIAS], dx, layer.act, lw[OUT], N, 4 * C, C);
        gelu_backward(dhidden, layer.hidden, N * 4 * C);
        linear_backward(dy, lg[FC], lg[FC_BIAS], dhidden, layer.m, lw[FC], N, C, 4 * C);
        layer_norm_backward(dx, lg[LN_2], lg[LN_2_BIAS], dy, layer.n_2, layer.inverse_std_2, lw[LN_2], N, C);
        linear_backward(dy, lg[PROJ], lg[PROJ_BIAS], dx, layer.y, lw[PROJ], N, C, C);
        attention_backward(dqkv, dp, dy, layer.p, layer.qkv, B, T, C, s.H);
        linear_backward(dy, lg[ATTN], lg[ATTN_BIAS], dqkv, layer.a, lw[ATTN], N, C, 3 * C);
        layer_norm_backward(dx, lg[LN_1], lg[LN_1_BIAS], dy, layer.n_1, layer.inverse_std_1, lw[LN_1], N, C);
    }
    embedding_backward(g.tensors[WTE], g.tensors[WPE], dx, ids, N, T, C);
    free(dx), free(dy), free(dhidden), free(dp);
}

// AdamW (Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019): w -= lr (m̂ / (√v̂ + ε) + decay w), in place.
// Vectors (biases and norms) do not decay.
static void adamw(Shape s, Weights w, Weights g, Weights m, Weights v, int step, double learning_rate) {
    const float beta1 = 0.9f, beta2 = 0.95f, decay = 0.1f;
    float rate = (float)(learning_rate / (1 - pow(beta1, step))), v_correction = (float)(1 / (1 - pow(beta2, step)));
    for (size_t i = 0; i < tensor_count(s); i++) {
        TensorSpec spec = tensor_spec(s, i);
        float decay_factor = spec.rows ? 1.0f - (float)learning_rate * decay : 1.0f;
        float *mi = m.tensors[i], *vi = v.tensors[i];
        PARALLEL_FOR
        for (size_t k = 0; k < element_count(spec); k++) {
            float grad = g.tensors[i][k];
            mi[k] += (grad - mi[k]) * (1.0f - beta1);
            vi[k] += (grad * grad - vi[k]) * (1.0f - beta2);
            w.tensors[i][k] = w.tensors[i][k] * decay_factor - rate * mi[k] / (sqrtf(vi[k] * v_correction) + 1e-8f);
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
    if (size < 0 || size % 2) fail("%s is not a file of 16-bit tokens: it has an odd number of bytes", path);
    rewind(file);
    *count = (size_t)size / 2;
    uint16_t *ids = allocate(*count, 2);
    uint8_t *bytes = allocate(*count, 2);
    if (fread(bytes, 2, *count, file) != *count) fail("%s cannot be read", path);
    for (size_t i = 0; i < *count; i++) {
        ids[i] = (uint16_t)(bytes[2 * i] | bytes[2 * i + 1] << 8);  // little-endian on every machine
        if (ids[i] >= V) fail("%s contains the token id %u, but the vocabulary size is %zu", path, ids[i], V);
    }
    free(bytes);
    fclose(file);
    return ids;
}

static void evaluate(Shape s, Weights w, const uint16_t *ids, size_t count, Options o) {
    size_t windows = (count - 1) / o.block, rows = o.steps ? min(windows, o.steps * o.batch) : windows;
    o.batch = min(o.batch, rows);
    Activations acts = make_activations(s, o.batch * o.block, o.block, EVALUATE);
    FILE *logits = o.logits ? fopen(o.logits, "wb") : NULL;
    if (o.logits && !logits) fail("%s cannot be written", o.logits);
    double total = 0;
    for (size_t i = 0; i < rows; i += o.batch) {
        size_t batch_rows = min(o.batch, rows - i);
        const uint16_t *window = ids + i * o.block;
        total += compute_loss(s, w, &acts, window, window + 1, batch_rows, o.block, logits) * (double)batch_rows;
    }
    if (logits && fclose(logits)) fail("%s cannot be written", o.logits);
    free_activations(s, acts);
    printf("loss %.6f  perplexity %.3f\n", total / (double)rows, exp(total / (double)rows));
}

static void train(Shape s, Weights w, const uint16_t *ids, size_t count, Options o) {
    size_t windows = (count - 1) / o.block, next = 0;
    Weights g = make_weights(s), m = make_weights(s), v = make_weights(s);
    if (o.out) check_writable(o.out);
    if (o.gradients) check_writable(o.gradients);
    Activations acts = make_activations(s, o.batch * o.block, o.block, TRAIN);
    uint16_t *batch = allocate(2 * o.batch * o.block, 2), *targets = batch + o.batch * o.block;
    for (size_t step = 1; step <= o.steps; step++) {
        double start = now();
        for (size_t b = 0; b < o.batch; b++, next++) {  // consecutive windows, again from the first after the last
            const uint16_t *window = ids + next % windows * o.block;
            memcpy(batch + b * o.block, window, o.block * 2), memcpy(targets + b * o.block, window + 1, o.block * 2);
        }
        double loss = compute_loss(s, w, &acts, batch, targets, o.batch, o.block, NULL);
        memset(g.data, 0, g.count * sizeof(float));
        backward(s, w, g, &acts, batch, targets, o.batch, o.block);
        double seconds = now() - start;
        if (step == 1 && o.gradients) save(o.gradients, s, g);
        start = now();
        adamw(s, w, g, m, v, (int)step, o.learning_rate);
        double n = (double)(o.batch * o.block);
        printf("step %4zu  loss %.6f  %.0f tokens/s, %.0f with AdamW\n", step, loss, n / seconds,
               n / (seconds + now() - start));
        fflush(stdout);
    }
    if (o.out) save(o.out, s, w);
    free_activations(s, acts), free(batch), free_weights(g), free_weights(m), free_weights(v);
}

// Greedy generation. With the KV cache, each step computes one token. When the block is full, a new cache is computed
// from the last half block of tokens.
static void generate(Shape s, Weights w, const uint16_t *prompt, Options o) {
    if (s.V > 65536) fail("the vocabulary size is %zu, but there are only 65,536 token ids of 16 bits", s.V);
    Activations acts = make_activations(s, s.block, 1, GENERATE);
    float *p = acts.layers[0].p;
    size_t total = o.prompt, cached = 0;  // tokens so far, and tokens in the KV cache
    uint16_t *ids = allocate(total + o.count, 2), *window = ids;
    memcpy(ids, prompt, total * 2);
    if (total > s.block) window += total - s.block;
    double start = now();
    for (size_t i = 0; i < o.count; i++, total++) {
        if ((size_t)(ids + total - window) > s.block) {
            size_t half = s.block / 2 ? s.block / 2 : 1;
            window = ids + total - half, cached = 0;
        }
        size_t n_new = (size_t)(ids + total - window) - cached;
        free(p);
        p = zeros(s.H * n_new * (cached + n_new));
        for (size_t l = 0; l < s.L; l++) acts.layers[l].p = p;
        forward(s, w, &acts, window + cached, 1, n_new, cached);
        cached += n_new;
        const float *last = acts.f + (n_new - 1) * s.C;
        matmul(1, s.V, s.C, row_major(last, s.C), transposed(w.tensors[WTE], s.C), acts.logits, s.V, false);
        size_t best = 0;
        for (size_t t = 1; t < s.V; t++) best = acts.logits[t] > acts.logits[best] ? t : best;
        ids[total] = (uint16_t)best;
        printf(i ? ",%zu" : "%zu", best);
        fflush(stdout);
    }
    putchar('\n');
    fprintf(stderr, "%.1f tokens/s\n", (double)o.count / (now() - start));
    free_activations(s, acts), free(ids);
}

static size_t parse_size(const char *name, const char *text, size_t low, size_t high) {
    char *end;
    unsigned long long value = strtoull(text, &end, 10);
    if (*text < '0' || *text > '9' || *end || value < low || value > high)
        fail("--%s=%s must be an integer from %zu to %zu", name, text, low, high);
    return (size_t)value;
}

static const char USAGE[] =
    "usage: gpt2 loss|generate|train model.safetensors tokens.bin [options]\n"
    "  --block=N --batch=N   tokens per row; rows per batch (train: 64 and 4)\n"
    "  --steps=N             train: steps (20); loss: maximum number of batches (0: all)\n"
    "  --learning_rate=X     train: learning rate of AdamW (1e-4)\n"
    "  --prompt=N --count=N  generate: tokens of the file used as the prompt (8); tokens to generate (40)\n"
    "  --heads=N             number of attention heads (width / 64)\n"
    "  --logits=FILE         loss: write the logits, raw float32\n"
    "  --gradients=FILE      train: write the gradients of the first step, safetensors\n"
    "  --out=FILE            train: write the trained weights, safetensors";

static Options read_options(int argc, char **argv, bool training) {
    Options o = {.batch = 4, .steps = training ? 20 : 0, .prompt = 8, .count = 40,
                 .learning_rate = 1e-4};
    struct { const char *name; size_t *value; size_t low; } sizes[] = {
        {"block", &o.block, 1}, {"batch", &o.batch, 1}, {"steps", &o.steps, 0},
        {"prompt", &o.prompt, 1}, {"count", &o.count, 0}, {"heads", &o.heads, 1},
    };
    struct { const char *name; const char **value; } files[] = {
        {"logits", &o.logits}, {"gradients", &o.gradients}, {"out", &o.out},
    };
    for (int i = 0; i < argc; i++) {
        const char *value = strchr(argv[i], '=');
        if (strncmp(argv[i], "--", 2) || !value++) fail("unknown option %s\n%s", argv[i], USAGE);
        size_t length = (size_t)(value - 1 - (argv[i] + 2));
        bool recognized = false;
        for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++)
            if (equals(argv[i] + 2, length, sizes[k].name))
                *sizes[k].value = parse_size(sizes[k].name, value, sizes[k].low, 1u << 20), recognized = true;
        for (size_t k = 0; k < sizeof files / sizeof *files; k++)
            if (equals(argv[i] + 2, length, files[k].name)) *files[k].value = value, recognized = true;
        if (equals(argv[i] + 2, length, "learning_rate")) {
            char *end;
            o.learning_rate = strtod(value, &end), recognized = true;
            if (end == value || *end || !(o.learning_rate >= 0 && o.learning_rate < 1e6))
                fail("%s must be a number from 0 to 1e6", argv[i]);
        }
        if (!recognized) fail("unknown option %s\n%s", argv[i], USAGE);
    }
    return o;
}

#ifndef FUZZ
int main(int argc, char **argv) {
    const char *command = argc > 1 ? argv[1] : "";
    bool training = !strcmp(command, "train"), generating = !strcmp(command, "generate");
    if (argc < 4 || (!training && !generating && strcmp(command, "loss"))) {
        fprintf(stderr, "%s\n", USAGE);
        return 2;
    }
    Options o = read_options(argc - 4, argv + 4, training);
    Shape s;
    Weights w = load(argv[2], &s, o.heads);
    size_t tokens;
    uint16_t *ids = read_tokens(argv[3], &tokens, s.V);
    if (!o.block) o.block = training ? min(64, s.block) : s.block;
    if (o.block > s.block) fail("--block=%zu is larger than the block size of the model, %zu", o.block, s.block);
    size_t needed = generating ? o.prompt : o.block + 1;
    if (tokens < needed)
        fail("%s contains %zu tokens, but %zu are needed: use a smaller %s", argv[3], tokens, needed,
             generating ? "--prompt" : "--block");
    if (generating) generate(s, w, ids, o);
    else if (training) train(s, w, ids, tokens, o);
    else evaluate(s, w, ids, tokens, o);
    free_weights(w), free(ids);
    return 0;
}
#endif
