/* The floor of a guest's boot: an init that powers off at once. Compiled for the guest when it is measured.
 */
#include <sys/reboot.h>
#include <unistd.h>

int main(void)
{
	reboot(RB_POWER_OFF);
	for (;;)
		pause();
}
