/* From the initramfs to a root file system with everything mounted: what PID 1 does before it talks. */
#ifndef UMM_GUEST_SETUP_H
#define UMM_GUEST_SETUP_H

enum { UMM_SETUP_TEXT = 160 };

/* What failed, for people. */
struct umm_setup_failure {
	int error;
	char what[UMM_SETUP_TEXT];
};

/* Each returns 0, or negative errno with `failure` filled. */

/* proc, sysfs, devtmpfs, and the modules that the kernel has not built in, in the order of /modules/order. */
int umm_setup_early(struct umm_setup_failure *failure);
/* The root file system from the layers, and what is mounted in it. */
int umm_setup_root(struct umm_setup_failure *failure);
/* The port of that name, opened once the host is there. The descriptor. */
int umm_open_port(const char *name, struct umm_setup_failure *failure);

int umm_load_modules(struct umm_setup_failure *failure);
/* Mount layers and switch to them; does nothing when the command line names none. */
int umm_enter_layers(struct umm_setup_failure *failure);

/* Fill `failure` from errno. */
int umm_setup_fail(struct umm_setup_failure *failure, const char *format, ...)
        __attribute__((format(printf, 2, 3)));
/* A number NAME=N of the kernel's command line, 0 when it is not there. */
unsigned long long umm_setup_option(const char *name);
/* A line on the console, for people who look there. */
void umm_say(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* A millisecond's rest, while something appears that the kernel makes. */
void umm_rest(void);

#endif
