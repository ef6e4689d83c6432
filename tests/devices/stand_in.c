/* Stand-in for a runner of ExecuTorch 1.4, with the same flags and output: executor_runner if built with
   -DEXECUTOR_RUNNER, llama_main otherwise. Its model is the summing decoder: the next id is the sum of all ids before it,
   modulo 13; letters a to m are its tokens, z ends a completion. -DWIDTH=N: tokens that its program takes in one call;
   -DVOCABULARY=N: logits that it computes. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef VOCABULARY
#define VOCABULARY 13
#endif
#ifndef WIDTH
#define WIDTH 8
#endif

static const char *given(int argc, char **argv, const char *flag, const char *otherwise) {
    for (int i = 1; i < argc; i++)
        if (!strncmp(argv[i], "--", 2) && !strncmp(argv[i] + 2, flag, strlen(flag)) && argv[i][2 + strlen(flag)] == '=')
            return argv[i] + 3 + strlen(flag);
    return otherwise;
}

/* Like gflags: an unknown flag is an error. */
static void refuse_unknown(int argc, char **argv, const char *known) {
    for (int i = 1; i < argc; i++) {
        char name[64] = " ";
        sscanf(argv[i], "--%60[a-z_]", name + 1);
        strcat(name, " ");
        if (!strstr(known, name)) {
            fprintf(stderr, "ERROR: unknown command line flag '%s'\n", name);
            exit(1);
        }
    }
}

static int help(const char *known) {
    char words[512];
    printf("stand_in: Warning: SetUsageMessage() never called\n\n  Flags from main.cpp:\n");
    strcpy(words, known);
    for (char *name = strtok(words, " "); name; name = strtok(NULL, " "))
        printf("    -%s (What it is for, on a line that is\n      folded.) type: string default: \"\"\n", name);
    return 1;
}

#ifdef EXECUTOR_RUNNER
static const char *KNOWN = " model_path inputs output_file num_executions cpu_threads ";

int main(int argc, char **argv) {
    if (argc == 2 && !strcmp(argv[1], "--help")) return help(KNOWN);
    refuse_unknown(argc, argv, KNOWN);
    char files[256], name[256];
    strncpy(files, given(argc, argv, "inputs", ""), 255);
    FILE *tokens = fopen(strtok(files, ","), "rb");
    long long ids[4 * WIDTH];
    size_t count = fread(ids, 8, 4 * WIDTH, tokens), sum = 0;
    if (count != WIDTH) {
        fprintf(stderr, "input size (%zu) and tensor size (%d) mismatch!\n", count * 8, WIDTH * 8);
        return 134;
    }
    for (size_t i = 0; i < count; i++) sum += ids[i];
    float logits[VOCABULARY] = {0};
    logits[sum % VOCABULARY] = 10;
    snprintf(name, 255, "%s-0.bin", given(argc, argv, "output_file", ""));
    FILE *out = fopen(name, "wb");
    fwrite(logits, sizeof *logits, VOCABULARY, out);
    return fclose(out);
}
#else
static const char *KNOWN = " model_path tokenizer_path prompt prompt_file temperature max_new_tokens cpu_threads ";

int main(int argc, char **argv) {
    if (argc == 2 && !strcmp(argv[1], "--help")) return help(KNOWN);
    refuse_unknown(argc, argv, KNOWN);
    char prompt[4096] = "";
    FILE *file = fopen(given(argc, argv, "prompt_file", ""), "rb");
    prompt[file ? fread(prompt, 1, 4095, file) : 0] = 0;
    int sum = 0, new = 0, most = atoi(given(argc, argv, "max_new_tokens", "0"));
    for (char *c = prompt; *c; c++) sum += *c - 'a';
    printf("%s", prompt);
    for (; new < most; new++) {
        if (sum % VOCABULARY == 11) break;
        putchar('a' + sum % VOCABULARY);
        sum += sum % VOCABULARY;
    }
    printf("z\nPyTorchObserver {\"prompt_tokens\":%zu,\"generated_tokens\":%d,\"model_load_start_ms\":1000,"
           "\"model_load_end_ms\":1250,\"inference_start_ms\":1250,\"inference_end_ms\":1550,"
           "\"prompt_eval_end_ms\":1350,\"first_token_ms\":1350,\"aggregate_sampling_time_ms\":1,"
           "\"SCALING_FACTOR_UNITS_PER_SECOND\":1000}\n", strlen(prompt), new);
    return 0;
}
#endif
